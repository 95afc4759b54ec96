"""Which modules of a causal language model LoRA may adapt, by their role."""

from __future__ import annotations

import logging
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nat_plugin_evsys.errors import ModelError

logger = logging.getLogger(__name__)

Role = Literal["attn", "mlp", "unembed"]

# A mixture-of-experts router decides *where* a token goes; Tinker and PEFT recipes leave it frozen.
_ROUTER_NAMES = frozenset({"gate", "router", "shared_expert_gate"})


def text_decoder(model: PreTrainedModel) -> Any:
    """The module that computes the last hidden states; some classes call the whole model their decoder (Llama 4)."""
    decoder = model.get_decoder()
    return getattr(model, "model", decoder) if decoder is model else decoder


def linear_roles(model: PreTrainedModel) -> dict[str, Role]:
    """Every linear layer of the text decoder and the unembedding, by full module name, in model order.

    Linear are ``nn.Linear`` and the ``Conv1D`` of GPT-2.

    ``attn``: below a module whose name says attention (``self_attn``, …). ``unembed``: the output head.
    ``mlp``: every other linear layer of the decoder, shared experts included. Routers are never adapted, and neither
    are routed experts that transformers keeps as one fused 3-D parameter (see ``fused_experts``).
    """
    head = model.get_output_embeddings()
    decoder = text_decoder(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    roles: dict[str, Role] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        if module is head:
            roles[name] = "unembed"
            continue
        path = name.split(".")
        if path[-1] == "out_proj" and "Mamba" in type(model.get_submodule(name.rpartition(".")[0])).__name__:
            continue  # Mamba's kernels read its weight and never call it; PEFT refuses it too
        if (prefix and not name.startswith(prefix + ".")) or path[-1] in _ROUTER_NAMES:
            continue
        is_attention = any("attn" in part or "attention" in part for part in path[:-1])
        roles[name] = "attn" if is_attention else "mlp"
    return roles


def fused_experts(model: PreTrainedModel) -> list[str]:
    """Names of routed-expert weights held as 3-D parameters ``[experts, out, in]``; LoRA does not reach these."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and ".experts." in name]


def select_targets(model: PreTrainedModel, *, train_attn: bool, train_mlp: bool, train_unembed: bool) -> list[str]:
    """Names of the linear layers to adapt.

    A mixture-of-experts model whose experts are fused keeps those experts frozen: the adapter covers attention and
    shared experts, and the log says so once per adapter.

    Raises:
        ModelError: the model has no linear layer of a requested role, or no role was requested.
    """
    wanted: dict[Role, bool] = {"attn": train_attn, "mlp": train_mlp, "unembed": train_unembed}
    if not any(wanted.values()):
        raise ModelError("nothing to train: set at least one of train_attn, train_mlp, train_unembed to true")
    roles = linear_roles(model)
    experts = fused_experts(model)
    chosen = [name for name, role in roles.items() if wanted[role]]
    for role, asked in wanted.items():
        if not asked or role in roles.values():
            continue
        if role == "mlp" and experts and chosen:
            continue
        why = " (its experts are fused 3-D parameters, which LoRA does not reach)" if role == "mlp" and experts else ""
        raise ModelError(f"train_{role}: {type(model).__name__} has no linear layer of that role{why}; set it to false")
    if train_mlp and experts:
        logger.warning(
            "%s: the %d fused expert weights stay frozen (LoRA reaches nn.Linear layers only)",
            type(model).__name__,
            len(experts),
        )
    return chosen
