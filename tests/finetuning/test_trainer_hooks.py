"""The hooks of NAT's Trainer as another caller than ``run`` sees them."""

from __future__ import annotations

import pytest
from nat.data_models.finetuning import TrainingJobRef

from nat_plugin_evsys.config import EvsysTrainerConfig
from nat_plugin_evsys.errors import JobError
from nat_plugin_evsys.finetuning.trainer import EvsysTrainer


class Started(EvsysTrainer):
    """A trainer whose epochs come to what the test says."""

    ref: TrainingJobRef | None = None

    async def start_epoch(self, epoch: int, run_id: str) -> TrainingJobRef | None:
        return self.ref


async def test_run_epoch_says_when_there_is_no_job_to_refer_to() -> None:
    with pytest.raises(JobError, match="epoch 3: no trajectory is left"):
        await Started(EvsysTrainerConfig()).run_epoch(2, "run")


async def test_run_epoch_returns_the_job_that_was_started() -> None:
    trainer = Started(EvsysTrainerConfig())
    trainer.ref = TrainingJobRef(run_id="run", backend="evsys")
    assert await trainer.run_epoch(0, "run") is trainer.ref
