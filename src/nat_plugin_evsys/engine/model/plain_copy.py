"""The base model as transformers made it, for computations that must not depend on the engine's changes to it."""

from __future__ import annotations

import copy
import itertools

from torch import nn
from transformers import PreTrainedModel

from nat_plugin_evsys.engine.model import quantized
from nat_plugin_evsys.engine.model.long_rope import LongRotary
from nat_plugin_evsys.engine.model.lora import LoraLinear


def copy_of_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules, over the same tensors."""
    shared = itertools.chain(model.parameters(), model.buffers(), quantized.shared_states(model))
    return copy.deepcopy(model, {id(each): each for each in shared})


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules, with their own classes again and plain SDPA; its tensors are those of ``model``.

    Whoever changes a weight must put a new tensor in its place.
    """
    plain = copy_of_modules(model)
    for name, module in list(plain.named_modules()):
        if type(module) is LoraLinear:
            module.__class__ = nn.Linear  # type: ignore[assignment]  # mypy takes it for a variable
        elif isinstance(module, LongRotary):
            plain.set_submodule(name, module.original)
    config = plain.config.get_text_config()
    if str(config._attn_implementation).startswith("evsys_"):
        config._attn_implementation_internal = "sdpa"
    return plain
