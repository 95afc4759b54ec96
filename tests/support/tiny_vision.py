"""Tiny models that read images, each of transformers' own classes with random weights, their processors and images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import transformers
from PIL import Image
from tinker import types
from tiny import CONTEXT, byte_tokenizer
from transformers import PreTrainedModel

from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model

START, PLACE, END, TURN = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>"
SPECIAL = (TURN, START, PLACE, END, "<|video_pad|>")
TURN_ID, START_ID, PLACE_ID, END_ID, VIDEO_ID = range(256, 261)
VOCAB = 264

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": TURN_ID,
    "pad_token_id": None,
}
_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.15}
_QWEN_TOWER = _TOWER | {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "out_hidden_size": 32}
_QWEN_IDS: dict[str, Any] = {
    "image_token_id": PLACE_ID,
    "video_token_id": VIDEO_ID,
    "vision_start_token_id": START_ID,
    "vision_end_token_id": END_ID,
    "tie_word_embeddings": False,
}


def _rope(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


def _qwen2_5() -> Any:
    tower = _QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]}
    text = _TEXT | {"rope_parameters": _rope(1, 1, 2)}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)


def _qwen3() -> Any:
    tower = _QWEN_TOWER | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = _TEXT | {"head_dim": 8, "rope_parameters": _rope(2, 1, 1, mrope_interleaved=True)}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **_QWEN_IDS)


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    text = _TEXT | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": layers}
    tower = _TOWER | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    ids: dict[str, Any] = {"image_token_id": PLACE_ID, "boi_token_id": START_ID, "eoi_token_id": END_ID}
    return transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4, **ids)


CONFIGS = {"qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3, "gemma3": _gemma3}
VISION_FAMILIES = tuple(CONFIGS)


def vision_model(family: str, *, seed: int = 0) -> PreTrainedModel:
    """A float32 model with weights of this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = transformers.AutoModelForImageTextToText.from_config(CONFIGS[family]())
        for name, parameter in model.named_parameters():
            if name.endswith("mm_input_projection_weight"):
                torch.nn.init.normal_(parameter, std=0.3)  # transformers begins with zeros, which show nothing
    loaded: PreTrainedModel = model.eval()
    return loaded


def image_processor(family: str) -> Any:
    """transformers' own, for pictures of a few pixels."""
    if family == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        return Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )


def vision_base(family: str) -> BaseModel:
    """The engine's base model of ``vision_model``."""
    return wrap_model(family, vision_model(family), byte_tokenizer(*SPECIAL), image_processor=image_processor(family))


def save_vision_model(family: str, path: Path) -> Path:
    """Write model, tokenizer and image processor to ``path``, as a user would have them."""
    vision_model(family).save_pretrained(path)
    image_processor(family).save_pretrained(path)
    byte_tokenizer(*SPECIAL).save_pretrained(path)
    return path


def picture(seed: int, width: int = 24, height: int = 16) -> Image.Image:
    """Random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Image.Image, form: str = "png") -> bytes:
    """The image's file."""
    file = io.BytesIO()
    image.save(file, form.upper())
    return file.getvalue()


def chunk_of(image: Image.Image, form: Literal["png", "jpeg"] = "png", **more: Any) -> types.ImageChunk:
    """The image as Tinker sends it."""
    return types.ImageChunk(data=file_of(image, form), format=form, **more)


def text(*tokens: int) -> types.EncodedTextChunk:
    """Token ids as Tinker sends them."""
    return types.EncodedTextChunk(tokens=list(tokens))


def processed(family: str, images: list[Image.Image], parts: list[list[int]]) -> dict[str, Any]:
    """What transformers' processor gives its model: ``parts[0]``, the first image, ``parts[1]``, … as tensors.

    How many placeholders an image takes is also the processor's word; Qwen's whole processor needs torchvision.
    """
    of_processor: Any
    own = image_processor(family)
    tensors = dict(own(images=images, return_tensors="pt"))
    if family == "gemma3":
        of_processor = transformers.Gemma3Processor(own, gemma_tokenizer(), image_seq_length=4)
        counts = of_processor._get_num_multimodal_tokens([i.size[::-1] for i in images]).num_image_tokens
        kinds, _ = "token_type_ids", tensors.pop("num_crops")
    else:
        kind = getattr(transformers, {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family])
        of_processor = SimpleNamespace(image_processor=own, image_token="*")
        counts = [len(kind.replace_image_token(of_processor, tensors, i)) for i in range(len(images))]
        kinds = "mm_token_type_ids"
    ids: list[int] = list(parts[0])
    for count, part in zip(counts, parts[1:], strict=True):
        ids += [PLACE_ID] * count + list(part)
    row = torch.tensor([ids])
    return tensors | {"input_ids": row, kinds: (row == PLACE_ID).long()}


def gemma_tokenizer() -> Any:
    """With the names that Gemma's processor asks for."""
    tokenizer: Any = byte_tokenizer(*SPECIAL)
    tokenizer.boi_token, tokenizer.eoi_token, tokenizer.image_token = START, END, PLACE
    tokenizer.boi_token_id, tokenizer.eoi_token_id, tokenizer.image_token_id = START_ID, END_ID, PLACE_ID
    return tokenizer


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def chat_template(family: str) -> str:
    """A template that shows images, with the mark that the family's own template writes for one."""
    return CHAT_TEMPLATE.replace("IMAGE", START if family == "gemma3" else START + PLACE + END)


def image_part(image: Image.Image) -> dict[str, Any]:
    """The image as a part of a message in OpenAI form."""
    url = f"data:image/png;base64,{base64.b64encode(file_of(image)).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}
