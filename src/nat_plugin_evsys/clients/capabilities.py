"""What a ServiceClient says of the models it can use."""

from __future__ import annotations

from collections.abc import Iterable

from tinker import types

from nat_plugin_evsys.clients.extensions import SupportedModel
from nat_plugin_evsys.engine.builtin import SPECS
from nat_plugin_evsys.engine.model import BaseModel


def capabilities(loaded: Iterable[BaseModel]) -> types.GetServerCapabilitiesResponse:
    """The builtin models and those in memory."""
    models = {
        name: SupportedModel(
            model_name=name, max_context_length=spec.max_position_embeddings, trainable=True, sampleable=True
        )
        for name, spec in SPECS.items()
    }
    models.update({base.name: _in_memory(base) for base in loaded})
    return types.GetServerCapabilitiesResponse(supported_models=list(models.values()))


def _in_memory(base: BaseModel) -> SupportedModel:
    return SupportedModel(
        model_name=base.name,
        max_context_length=base.context_length,
        trainable=True,
        sampleable=True,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
    )
