"""Whether PEFT computes with a saved adapter what the engine computes with it.

PEFT rewrites names and targets of models whose weights transformers 5 stores otherwise than their checkpoints do, and
what it then does not find it leaves out, with no more than a warning.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from nat_plugin_evsys.engine.model.forward import share_of_norm
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter, LoraLinear, applied, random_adapter
from nat_plugin_evsys.engine.model.peft_format import adapter_config, to_peft_names
from nat_plugin_evsys.engine.model.plain_copy import plain_copy
from nat_plugin_evsys.engine.model.quantized import keep_differentiable
from nat_plugin_evsys.errors import one_line

logger = logging.getLogger(__name__)

_TOKENS = 12
_FP32, _HALF = 1e-3, 0.15
_SAID: WeakKeyDictionary[BaseModel, set[frozenset[str]]] = WeakKeyDictionary()


def say_if_peft_differs(base: BaseModel, adapter: LoraAdapter) -> None:
    """At the first save of such an adapter: warn if PEFT would not compute what was trained. Needs ``peft`` here."""
    targets = frozenset(adapter.weights)
    if targets in _SAID.setdefault(base, set()):
        return
    _SAID[base].add(targets)
    if trains_tied_head(base, adapter):
        logger.warning(
            "%s: the adapter changes the output head, whose weight is also the embedding: PEFT's merge_and_unload() "
            "would change both. Merge it with `nat evsys export --merge`, or load it unmerged.",
            base.name,
        )
    if not _may_differ(base, adapter) or importlib.util.find_spec("peft") is None:
        return
    problem = peft_problem(base, adapter)
    if problem:
        logger.warning(
            "%s: PEFT does not load this adapter as it was trained: %s. The checkpoint is whole for this engine; for "
            "others, write the merged model with `nat evsys export --merge`.",
            base.name,
            problem,
        )


def trains_tied_head(base: BaseModel, adapter: LoraAdapter) -> bool:
    """Whether the adapter is on an output head that shares its weight with the embedding."""
    head, embedding = base.model.get_output_embeddings(), base.model.get_input_embeddings()
    name = next(name for name, module in base.model.named_modules() if module is head)
    return name in adapter.weights and head.weight is embedding.weight


def peft_problem(base: BaseModel, adapter: LoraAdapter) -> str:
    """What is wrong with an adapter of this shape in PEFT, "" if nothing: random matrices, written and loaded back."""
    probe = random_adapter(base.model, adapter.weights, rank=adapter.rank, alpha=adapter.alpha)
    ids = (torch.arange(_TOKENS, device=base.device) * 7 % base.vocab_size)[None]
    try:
        with tempfile.TemporaryDirectory() as directory:
            write_adapter(Path(directory), base, probe)
            loaded = load_in_peft(base.model, Path(directory))
        with torch.no_grad(), applied(None):
            found = loaded(input_ids=ids, use_cache=False).logits.float()
    except Exception as exc:  # noqa: BLE001 - boundary: PEFT and the model's code raise what they like
        return one_line(exc)
    with torch.no_grad(), applied(probe):
        expected: Tensor = base.model(input_ids=ids, use_cache=False).logits.float()
    gap = share_of_norm(found, expected)
    if gap <= (_FP32 if base.dtype == torch.float32 else _HALF):
        return ""
    return f"its logits are off by {gap:.1e} of their norm"


def write_adapter(directory: Path, base: BaseModel, adapter: LoraAdapter) -> None:
    """The two files that PEFT and vLLM load."""
    save_file(to_peft_names(adapter), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(adapter_config(base, adapter), indent=2) + "\n")


def load_in_peft(model: PreTrainedModel, directory: Path, *, trainable: bool = False) -> torch.nn.Module:
    """PEFT's model of a saved adapter over a plain copy of ``model``, whose tensors it shares."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(plain_copy(model), str(directory), is_trainable=trainable)
    module: torch.nn.Module = loaded.eval()
    keep_differentiable(module)
    return module


def _may_differ(base: BaseModel, adapter: LoraAdapter) -> bool:
    """PEFT takes names as they are, but where transformers converts a checkpoint's, or a layer is not ``nn.Linear``."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(base.model.config.model_type) is not None:
        return True
    return any(type(base.model.get_submodule(name)) is not LoraLinear for name in adapter.weights)
