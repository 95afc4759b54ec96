"""The frozen vision tower of a base model, and what its text decoder needs to read images among tokens.

A sequence with images runs through the model's own class, which puts the tower's features in the places of the
placeholder tokens. Features are computed once for each distinct image.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from nat_plugin_evsys.engine.model.images import ModelImage, NoImages, PlacedImage, content_key, decode
from nat_plugin_evsys.engine.model.quantized import packed_layers
from nat_plugin_evsys.engine.model.sized_cache import SizedCache, size_of

_FEATURE_BYTES = 256 * 2**20
_PREPARED_BYTES = 64 * 2**20
_MEASURED = 4096

Features = tuple[Tensor, ...]
"""Of one image: [tokens, H] in the place of its embeddings; and, for some models, what deeper layers add, likewise."""


class Vision:
    """Images for one base model, of any thread. A subclass is a way of placing images among tokens.

    Args:
        model: the frozen model, with its vision tower.
        processor: see below.

    Attributes:
        token: id of the placeholder that stands for each token of an image.
        processor: the checkpoint's image processor.
    """

    processor_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.token = int(model.config.image_token_id)
        self._model: Any = model.model
        self._config = model.config
        embedding: Any = model.get_input_embeddings()
        self._device: torch.device = embedding.weight.device
        self._dtype: torch.dtype = embedding.weight.dtype
        self.processor = processor
        self._lock = threading.Lock()
        self._measured: OrderedDict[tuple[bytes, str], tuple[int, ...]] = OrderedDict()
        self._features = SizedCache[bytes, Features](_FEATURE_BYTES)
        self._prepared = SizedCache[bytes, Any](_PREPARED_BYTES)

    def measure(self, data: bytes, form: str, where: str) -> ModelImage:
        """See ``ReadsImages``."""
        key = (content_key(data), form)
        with self._lock:
            grid = self._measured.get(key)
        if grid is None:
            pixels = self._pixels(data, form, where)
            grid = self._grid(pixels)
            with self._lock:
                # Its features are likely to be asked for next.
                self._prepared.put(key[0], pixels, size_of(pixels.values()))
                self._measured[key] = grid
                if len(self._measured) > _MEASURED:
                    self._measured.popitem(last=False)
        return ModelImage(data, form, key[0], grid, self._tokens(grid))

    def inputs(self, tokens: Tensor, images: Sequence[PlacedImage]) -> dict[str, Any]:
        """Arguments of the model's class for a whole sequence: ``tokens`` (T,), with the placeholders of ``images``."""
        ids = tokens.to(self._device)[None]
        kinds = torch.zeros_like(ids)
        for each in images:
            kinds[0, each.start : each.end] = 1
        encoded = self._joined([self._of(each.image) for each in images])
        return {"input_ids": ids, "mm_encoder_outputs": {"image": encoded}, **self._layout(ids, kinds, images)}

    def going_on(self, position: int, count: int, images: Sequence[PlacedImage]) -> dict[str, Any]:
        """Further arguments for ``count`` text tokens from ``position`` on, after ``images``, on top of the model's
        cache."""
        raise NotImplementedError

    def written(self, tokenizer: Any) -> tuple[str, str]:
        """See ``ReadsImages``."""
        mark = tokenizer.convert_ids_to_tokens(self.token)
        return mark, mark

    def probe(self) -> ModelImage:
        """An image of random features, which needs no tower; for checks before anything else is computed."""
        grid = self._probe_grid()
        image = ModelImage(b"", "png", content_key(b""), grid, self._tokens(grid))
        generator = torch.Generator().manual_seed(0)
        deeper = len(getattr(self._config.vision_config, "deepstack_visual_indexes", None) or ())
        shape = (1 + deeper, image.tokens, self._config.get_text_config().hidden_size)
        with torch.inference_mode(False):
            drawn = torch.randn(shape, generator=generator).to(device=self._device, dtype=self._dtype)
        self._keep(image.key, tuple(drawn))
        return image

    def hidden(self, tokens: Tensor, images: Sequence[PlacedImage]) -> Tensor:
        """Last hidden states [T, H] of one sequence."""
        hidden: Tensor = self._model(**self.inputs(tokens, images), use_cache=False).last_hidden_state[0]
        return hidden

    def _grid(self, processed: Any) -> tuple[int, ...]:
        raise NotImplementedError

    def _probe_grid(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _tokens(self, grid: tuple[int, ...]) -> int:
        raise NotImplementedError

    def _layout(self, ids: Tensor, kinds: Tensor, images: Sequence[PlacedImage]) -> dict[str, Any]:
        """Positions or attention of a whole sequence, ``ids`` [1, T]; ``kinds`` [1, T] is 1 at an image."""
        raise NotImplementedError

    def _encode(self, processed: Any) -> Features:
        raise NotImplementedError

    def _joined(self, features: Sequence[Features]) -> Any:
        """What the model's class takes for the tower's output over all images of a sequence."""
        raise NotImplementedError

    def _pixels(self, data: bytes, form: str, where: str) -> Any:
        picture = decode(data, form, where)
        return self.processor(images=[picture], return_tensors="pt", **self.processor_options)

    def _of(self, image: ModelImage) -> Features:
        with self._lock:
            known = self._features.get(image.key)
            if known is not None:
                return known
            pixels = self._prepared.pop(image.key)
        if pixels is None:
            pixels = self._pixels(image.data, image.form, "the input")
        # The sampler runs in inference mode, whose tensors a backward pass cannot keep.
        with torch.inference_mode(False), torch.no_grad():
            found = self._encode(pixels.to(self._device))
        self._keep(image.key, found)
        return found

    def _keep(self, key: bytes, features: Features) -> None:
        with self._lock:
            self._features.put(key, features, size_of(features))


class _QwenVision(Vision):
    """Qwen-VL: positions in time, height and width (M-RoPE, arXiv 2409.12191). Text after an image goes on from the
    image's longer side, so that positions lag behind the number of tokens."""

    def _grid(self, processed: Any) -> tuple[int, ...]:
        return tuple(int(n) for n in processed["image_grid_thw"][0])

    def _tokens(self, grid: tuple[int, ...]) -> int:
        time, height, width = grid
        return int(time * height * width // self._merge**2)

    def _probe_grid(self) -> tuple[int, ...]:
        return (1, 2 * self._merge, 4 * self._merge)

    @property
    def _merge(self) -> int:
        return int(self._config.vision_config.spatial_merge_size)

    def _layout(self, ids: Tensor, kinds: Tensor, images: Sequence[PlacedImage]) -> dict[str, Any]:
        grids = torch.tensor([each.image.grid for each in images], device=ids.device)
        # Given explicitly: the model's class would keep what it computes, and use it in other passes.
        positions, _ = self._model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        return {"position_ids": positions}

    def going_on(self, position: int, count: int, images: Sequence[PlacedImage]) -> dict[str, Any]:
        """See ``Vision``."""
        lag = sum(each.image.tokens - max(each.image.grid[1:]) // self._merge for each in images)
        positions = torch.arange(position - lag, position - lag + count, device=self._device)
        return {"position_ids": positions.expand(3, 1, count)}

    def _encode(self, processed: Any) -> Features:
        out = self._model.get_image_features(processed["pixel_values"], processed["image_grid_thw"], return_dict=True)
        return (out.pooler_output[0], *(layer[0] for layer in getattr(out, "deepstack_features", ())))

    def _joined(self, features: Sequence[Features]) -> Any:
        first, *deeper = zip(*features, strict=True)
        return SimpleNamespace(pooler_output=first, deepstack_features=deeper)


class _Gemma3Vision(Vision):
    """Gemma 3: each image has as many tokens, which attend to one another both ways."""

    # Crops of one image are further images, which no ImageChunk has room for.
    processor_options: ClassVar[dict[str, Any]] = {"do_pan_and_scan": False}

    def _grid(self, processed: Any) -> tuple[int, ...]:
        return ()

    def _probe_grid(self) -> tuple[int, ...]:
        return ()

    def _tokens(self, grid: tuple[int, ...]) -> int:
        return int(self._config.mm_tokens_per_image)

    def written(self, tokenizer: Any) -> tuple[str, str]:
        """See ``ReadsImages``; as transformers' ``Gemma3Processor`` has it."""
        ids = [self._config.boi_token_id, self.token, self._config.eoi_token_id]
        begin, image, end = tokenizer.convert_ids_to_tokens(ids)
        return begin, f"\n\n{begin}{image}{end}\n\n"

    def _layout(self, ids: Tensor, kinds: Tensor, images: Sequence[PlacedImage]) -> dict[str, Any]:
        return {"token_type_ids": kinds}

    def going_on(self, position: int, count: int, images: Sequence[PlacedImage]) -> dict[str, Any]:
        """See ``Vision``."""
        return {}

    def _encode(self, processed: Any) -> Features:
        out = self._model.get_image_features(processed["pixel_values"], return_dict=True)
        return (out.pooler_output[0],)

    def _joined(self, features: Sequence[Features]) -> Any:
        return SimpleNamespace(pooler_output=torch.stack([only for (only,) in features]))


FAMILIES: dict[str, type[Vision]] = {
    "qwen2_5_vl": _QwenVision,
    "qwen3_vl": _QwenVision,
    "gemma3": _Gemma3Vision,
}
"""By ``model_type``: those whose numbers the tests compare with transformers' own."""


def find_vision(model: PreTrainedModel, processor: Any) -> Vision | NoImages:
    """What reads images for ``model``, or why nothing does. ``processor``: its image processor, None without one."""
    kind, name = FAMILIES.get(model.config.model_type), type(model).__name__
    if kind is None:
        return NoImages(f"images are offered for {', '.join(FAMILIES)}, and this is {model.config.model_type}")
    if processor is None:
        return NoImages("the model's directory has no preprocessor_config.json, so that images cannot be prepared")
    if packed_layers(model):
        return NoImages("its layers are packed, and images need plain weights; set quantization: none")
    if "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters:
        return NoImages(f"{name} of this transformers takes no computed image features; upgrade transformers")
    if not 0 <= model.config.image_token_id < model.config.get_text_config().vocab_size:
        return NoImages(f"its image_token_id {model.config.image_token_id} is outside its vocabulary")
    return kind(model, processor)


def auto_class(model_type: str | None) -> Any:
    """The class of transformers that loads a model of this type whole: with its vision tower, if that is offered."""
    return AutoModelForImageTextToText if model_type in FAMILIES else AutoModelForCausalLM


def load_image_processor(where: str | Path, model_type: str | None, **options: Any) -> Any:
    """The image processor beside a model that reads images; None for another model, or if it has none."""
    if model_type not in FAMILIES:
        return None
    try:
        return AutoImageProcessor.from_pretrained(where, **options)
    except (OSError, ValueError):
        return None
