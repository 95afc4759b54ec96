"""What the store keeps about sessions, models, samplers and results: its rows, as the rest of the server sees them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.runtime import defaults
from nat_plugin_evsys.runtime.runs import RunRecord
from nat_plugin_evsys.service.store.operations import Outcome
from nat_plugin_evsys.service.wire.kinds import OperationKind

INFLIGHT = "inflight"


@dataclass(frozen=True)
class SessionRow:
    """One client's session. Times are seconds since the epoch."""

    session_id: str
    owner: str
    created_at: float = field(default_factory=time.time)
    last_seen: float = field(default_factory=time.time)
    tags: list[str] = field(default_factory=list)
    user_metadata: dict[str, Any] = field(default_factory=dict)
    sdk_version: str = ""
    finished: str | None = None
    """Why it ended: success, errored or interrupted; None while it runs."""
    display_name: str | None = None
    project_id: str | None = None


@dataclass(frozen=True)
class ModelRow:
    """One LoRA adapter in training.

    Attributes:
        next_seq: the first training operation that has not ended.
        saved_state: name of the directory that holds the last state that was saved.
        saved_state_seq: the last operation that the saved state covers; -1 without one.
    """

    model_id: str
    session_id: str
    owner: str
    model_seq_id: int
    base_model: str
    lora_rank: int
    lora_seed: int | None = None
    train_attn: bool = defaults.TRAIN_ATTN
    train_mlp: bool = defaults.TRAIN_MLP
    train_unembed: bool = defaults.TINKER_TRAIN_UNEMBED
    user_metadata: dict[str, Any] = field(default_factory=dict)
    created_at: float = field(default_factory=time.time)
    next_seq: int = 0
    saved_state: str | None = None
    saved_state_seq: int = -1

    def run_record(self) -> RunRecord:
        """The model's training run, last active now."""
        return RunRecord(
            model_id=self.model_id,
            base_model=self.base_model,
            lora_rank=self.lora_rank,
            train_attn=self.train_attn,
            train_mlp=self.train_mlp,
            train_unembed=self.train_unembed,
            user_metadata=dict(self.user_metadata),
            created_at=self.created_at,
        )


@dataclass(frozen=True)
class SamplerRow:
    """One sampling session: a base model, a checkpoint (``model_path``), or ephemeral weights (``directory``).

    Attributes:
        seq_id: the client's ``sampling_session_seq_id``.
        model_path: the ``tinker://`` path that it samples from.
        directory: name of the directory of its ephemeral weights. The inflight samplers of a model share one.
        model_id: the model that the weights come from.
        step: that model's optimizer steps.
        dropped: its weights have been deleted.
    """

    sampler_id: str
    session_id: str
    owner: str
    seq_id: int
    base_model: str
    model_path: str | None = None
    directory: str | None = None
    model_id: str | None = None
    step: int = 0
    created_at: float = field(default_factory=time.time)
    dropped: bool = False

    @property
    def inflight(self) -> bool:
        """Whether it follows the weights that its model publishes."""
        return self.directory is not None and self.directory == inflight_directory(str(self.model_id))

    def check_number(self, kept: SamplerRow) -> None:
        """Raises DataError if its number is that of ``kept``, which samples from something else."""
        own, other = ((row.base_model, row.model_path, row.directory) for row in (self, kept))
        if own != other:
            number = f"sampling_session_seq_id {self.seq_id}"
            raise DataError(f"{number} is taken in session {self.session_id}; use the next one")


def inflight_directory(model_id: str) -> str:
    """Name of the directory of the weights that all inflight samplers of a model sample from."""
    return f"{model_id}/{INFLIGHT}"


@dataclass(frozen=True)
class StoredOutcome:
    """The state of one request; ``outcome`` is None until it has ended."""

    request_id: str
    owner: str
    kind: OperationKind
    scope: str
    seq_id: int
    created_at: float
    outcome: Outcome | None
    delivered_at: float | None
