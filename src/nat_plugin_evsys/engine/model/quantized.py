"""Frozen base models whose linear layers are stored in few bits (QLoRA, arXiv 2305.14314).

bitsandbytes' layers stay packed: the adapter is added to what their own forward gives. Checkpoints in other formats are
unpacked at load where transformers does that, and refused by name where it does not.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nat_plugin_evsys.errors import ConfigError, ModelError
from nat_plugin_evsys.runtime.defaults import QUANTIZATION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = ("nf4", "nf4-double", "fp4", "int8")
"""What a model can be packed into at load; ``-double`` packs the scales of the blocks, too."""

READERS = ("accelerate", "bitsandbytes")
INSTALL = f"pip install {' '.join(READERS)}"

_UNPACKED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Formats of checkpoints that transformers unpacks without further packages, and its class for each."""

_LEFTOVERS = ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "_weight_conversions")
"""What transformers keeps of a quantized load; by the last, ``save_pretrained`` would do the conversion backwards."""


def loading_options(
    base_model: str, asked: str, stored: dict[str, Any] | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Extra arguments of a model's ``from_pretrained``.

    Args:
        base_model: what the user typed.
        asked: ``none``, or one of ``PACKED``.
        stored: ``quantization_config`` of the checkpoint's config.json; None if its weights are plain.
        dtype: what packed layers compute in.
        device: where they are packed.

    Raises:
        ConfigError: ``asked`` is unknown, or is not what the checkpoint has.
        ModelError: the checkpoint's format cannot be read here, or a package is missing; the message says what to do.
    """
    if asked not in (QUANTIZATION, *PACKED):
        raise ConfigError(f"quantization {asked!r} is unknown; use one of {', '.join((QUANTIZATION, *PACKED))}")
    if stored is None:
        if asked == QUANTIZATION:
            return {}
        _check_installed(f"base_model {base_model!r} with quantization {asked}")
        return _of_bitsandbytes(_config(asked, dtype), device)
    method = _method(stored)
    if method == "bitsandbytes":
        if asked not in (QUANTIZATION, (name := _stored_name(stored))):
            raise ConfigError(f"base_model {base_model!r} is stored as {name}; set quantization to {name} or none")
        _check_installed(f"base_model {base_model!r} is stored as {_stored_name(stored)}, and")
        return _of_bitsandbytes(None, device)
    if method not in _UNPACKED:
        raise ModelError(
            f"base_model {base_model!r} is a {method} checkpoint, whose layers this engine cannot train through; give "
            "the model that it was made from, with quantization: nf4 (or int8) if that is too large"
        )
    if asked != QUANTIZATION:
        raise ConfigError(
            f"base_model {base_model!r} is a {method} checkpoint, which is unpacked at load and not packed again; set "
            "quantization to none, or give the model that it was made from"
        )
    import transformers

    return {"quantization_config": getattr(transformers, _UNPACKED[method])(dequantize=True)}


@contextmanager
def quiet_about_merging() -> Iterator[None]:
    """Without transformers' warning that a checkpoint's own settings win over those of ``loading_options``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        yield


def packed_layers(model: nn.Module) -> dict[str, Any]:
    """bitsandbytes' layers by module name."""
    return {name: module for name, module in model.named_modules() if _is_packed(module)}


def packed_name(model: PreTrainedModel) -> str | None:
    """Which of ``PACKED`` a model's layers are in; None if they are plain."""
    layer = next(iter(packed_layers(model).values()), None)
    if layer is None:
        return None
    if not hasattr(layer.weight, "quant_state"):
        return "int8"
    return str(layer.weight.quant_type) + ("-double" if layer.weight.quant_state.nested else "")


def keep_differentiable(model: nn.Module) -> None:
    """Let packed layers compute one thing for training and sampling, through which gradients flow.

    In eval mode bitsandbytes rounds the inputs of 8-bit layers, columns of outliers apart, so that a token's logits
    depend on what else is in its batch. On some processors it also packs 4-bit weights anew, without a gradient.
    (On a GPU it rounds the inputs of 8-bit layers in training, too.)
    """
    for layer in packed_layers(model).values():
        layer.train()
        if getattr(layer.weight, "CB", None) is not None:
            layer.init_8bit_state()  # now: two threads that meet an unprepared layer would both do it


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let 4-bit layers multiply in ``dtype``, whatever their checkpoint says."""
    for layer in packed_layers(model).values():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype, layer.compute_type_is_set = dtype, True


def check_head(name: str, model: PreTrainedModel) -> None:
    """Raises ModelError: the output head is packed."""
    if _is_packed(model.get_output_embeddings()):
        raise ModelError(
            f"base_model {name!r}: its output head is quantized, which this engine cannot train through; save it with "
            "lm_head in llm_int8_skip_modules"
        )


def shared_states(model: nn.Module) -> Iterator[Any]:
    """What packed layers hold beside parameters and buffers: scales, and the 8-bit weights once more."""
    for layer in packed_layers(model).values():
        for name in ("state", "quant_state"):
            if getattr(layer, name, None) is not None:
                yield getattr(layer, name)


def unpack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace packed layers by plain ones in ``dtype``, of the classes that the model had before it was packed."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for name, layer in packed_layers(model).items():
        weight: Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).to(dtype)
        with torch.device("meta"):
            if issubclass(layer.source_cls, Conv1D):
                plain: Any = Conv1D(layer.out_features, layer.in_features)
                weight = weight.T.contiguous()
            else:
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
        model.set_submodule(name, plain)
    forget(model)


def forget(model: PreTrainedModel) -> None:
    """Make a model that was unpacked like any other: it can be saved, and it is the same model
    (``identity.model_identity``) when it is loaded from what was saved.
    """
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in _LEFTOVERS:
        if hasattr(model, name):
            delattr(model, name)


def _is_packed(module: Any) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def _check_installed(what: str) -> None:
    if not all(importlib.util.find_spec(name) for name in READERS):
        raise ModelError(f"{what} needs packages that are not installed: {INSTALL}")


def _method(stored: dict[str, Any]) -> str:
    if stored.get("load_in_4bit") or stored.get("load_in_8bit"):
        return "bitsandbytes"
    return str(stored.get("quant_method", "quantized"))


def _stored_name(stored: dict[str, Any]) -> str:
    if stored.get("load_in_8bit") or stored.get("_load_in_8bit"):
        return "int8"
    return str(stored.get("bnb_4bit_quant_type", "fp4")) + ("-double" * bool(stored.get("bnb_4bit_use_double_quant")))


def _config(name: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, _, double = name.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=dtype,
    )


def _of_bitsandbytes(config: Any, device: torch.device) -> dict[str, Any]:
    # Packed where they will be: afterwards it could not be moved with a plain copy of each layer alive.
    return {"device_map": {"": str(device)}} | ({} if config is None else {"quantization_config": config})
