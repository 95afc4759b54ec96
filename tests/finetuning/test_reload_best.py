"""Which checkpoint `on_collapse: reload_best` loads."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.finetuning.collapse import reload_best
from nat_plugin_evsys.runs.state import CheckpointRecord, RunState

REWARDS = (0.25, 0.7, None)


class Loaded:
    """Stands for the epochs' checkpoints: what was loaded."""

    def __init__(self, missing: str | None = None) -> None:
        self.names: list[str] = []
        self.missing = missing

    async def load(self, record: CheckpointRecord) -> None:
        if record.name == self.missing:
            raise CheckpointError(f"{record.name} is gone")
        self.names.append(record.name)


@pytest.mark.parametrize(
    ("rewards", "measured", "wanted"),
    [
        (REWARDS, None, ["epoch-1"]),
        (REWARDS, 0.2, ["epoch-1"]),
        (REWARDS, 0.7, ["epoch-1"]),
        (REWARDS, 0.9, []),
        ((None, None), 0.2, []),
    ],
)
async def test_the_best_measured_one_unless_the_policy_is_better(
    rewards: tuple[float | None, ...], measured: float | None, wanted: list[str]
) -> None:
    loaded: Any = Loaded()
    records = [CheckpointRecord(f"epoch-{n}", n, reward, f"epoch-{n}") for n, reward in enumerate(rewards)]
    best = await reload_best(loaded, RunState(checkpoints=records), measured)
    assert loaded.names == wanted
    assert ([] if best is None else [best.name]) == wanted


async def test_a_checkpoint_that_is_gone_does_not_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    records = [CheckpointRecord(f"epoch-{n}", n, reward, f"epoch-{n}") for n, reward in enumerate(REWARDS)]
    gone: Any = Loaded(missing="epoch-1")
    assert await reload_best(gone, RunState(checkpoints=records), 0.1) is None
    assert "epoch-1 cannot be loaded, so the run goes on as it is: epoch-1 is gone" in caplog.text
