"""The operations of the protocol."""

from __future__ import annotations

from enum import StrEnum


class OperationKind(StrEnum):
    """What is asked for; the value is the last part of the protocol's path."""

    CREATE_MODEL = "create_model"
    FORWARD_BACKWARD = "forward_backward"
    """Also forward: the request says ``forward_only``."""
    OPTIM_STEP = "optim_step"
    SAVE_WEIGHTS = "save_weights"
    SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
    SAVE_WEIGHTS_EXTERNAL = "save_weights_external"
    LOAD_WEIGHTS = "load_weights"
    SAMPLE = "asample"
