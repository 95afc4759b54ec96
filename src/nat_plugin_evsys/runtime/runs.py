"""A training run: what is known of a TrainingClient's model, in memory and on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from tinker import types

from nat_plugin_evsys.engine.checkpoints import CheckpointInfo

RUN_FILE = "run.json"


@dataclass
class RunRecord:
    """One training run.

    Attributes:
        model_id: ``<session_id>:train:<n>``; Tinker's training_run_id.
        base_model: what the user typed.
        lora_rank: LoRA rank.
        train_attn, train_mlp, train_unembed: which layers have LoRA matrices.
        user_metadata: what the user gave.
        created_at, last_request_at: seconds since the epoch.
    """

    model_id: str
    base_model: str
    lora_rank: int
    train_attn: bool
    train_mlp: bool
    train_unembed: bool
    user_metadata: dict[str, str]
    created_at: float = field(default_factory=time.time)
    last_request_at: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """The contents of ``run.json``."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_tinker(self, checkpoints: Sequence[types.Checkpoint]) -> types.TrainingRun:
        """Tinker's form, given the run's checkpoints, oldest first."""

        def last(kind: str) -> types.Checkpoint | None:
            return next((c for c in reversed(checkpoints) if c.checkpoint_type == kind), None)

        return types.TrainingRun(
            training_run_id=self.model_id,
            base_model=self.base_model,
            model_owner="local",
            is_lora=True,
            lora_rank=self.lora_rank,
            last_request_time=datetime.fromtimestamp(self.last_request_at, UTC),
            last_checkpoint=last("training"),
            last_sampler_checkpoint=last("sampler"),
            user_metadata=self.user_metadata or None,
        )

    def weights_info(self, checkpoint: CheckpointInfo) -> types.WeightsInfoResponse:
        """What a checkpoint of the run holds, in Tinker's form."""
        return types.WeightsInfoResponse(
            base_model=checkpoint.base_model,
            is_lora=True,
            lora_rank=checkpoint.rank,
            train_unembed=self.train_unembed,
            train_mlp=self.train_mlp,
            train_attn=self.train_attn,
        )
