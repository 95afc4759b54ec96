"""The state of a run between two epochs: the content of ``state.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from nat_plugin_evsys.errors import CheckpointError

RunStatus = Literal["running", "finished", "failed", "interrupted"]

FORMAT = 1


@dataclass(slots=True)
class CheckpointRecord:
    """One saved epoch.

    Attributes:
        name: the name it was saved under.
        epoch: epochs finished when it was saved; 0 is before the first one.
        reward: the reward that `best` compares, or None when it was not measured.
        adapter: the weights for sampling: a path (relative to the run directory if inside it) or a URI.
        training_state: path or URI of the weights with the optimizer state, or None.
        trained: whether the run had trained anything when it was saved.
    """

    name: str
    epoch: int
    reward: float | None
    adapter: str
    training_state: str | None = None
    trained: bool = True

    @property
    def policy(self) -> str:
        """Which policy it is, in words."""
        return f"the policy of epoch {self.epoch}" if self.epoch else "the policy before the first epoch"


@dataclass(slots=True)
class RunState:
    """Everything that a resumed run needs beyond the weights. Rewards are means over rollouts.

    Attributes:
        epochs_done: epochs whose training, checkpoint and metrics are all on disk.
        tally: calls, ``{"calls": n, "trained": n, "dropped": {reason: n}}``.
        trajectories: ``{"trained": n, "dropped": {reason: n}}``.
        heldout_reward_base: of the base model, if a warm start comes before ``heldout_reward_before``.
        seconds: time spent so far, over all of its sessions.
        curriculum: the curriculum's own state.
        config_hash: hash of the settings that decide what a run computes.
    """

    status: RunStatus = "running"
    error: str | None = None
    epochs_done: int = 0
    warm_started: bool = False
    best_epoch: int | None = None
    best_reward: float | None = None
    train_reward_before: float | None = None
    train_reward_after: float | None = None
    heldout_reward_base: float | None = None
    heldout_reward_before: float | None = None
    heldout_reward_after: float | None = None
    tally: dict[str, Any] = field(default_factory=lambda: {"calls": 0, "trained": 0, "dropped": {}})
    trajectories: dict[str, Any] = field(default_factory=lambda: {"trained": 0, "dropped": {}})
    seconds: float = 0.0
    curriculum: dict[str, Any] = field(default_factory=dict)
    config_hash: str | None = None
    checkpoints: list[CheckpointRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict; ``RunState.from_dict`` gives the state back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: Path) -> RunState:
        """The state in ``data``.

        Raises:
            CheckpointError: written by another version of this package, or not a run's state.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            seen = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise CheckpointError(
                f"{source}: not a run state of format {FORMAT} (seen: {seen}); use the version that wrote it"
            )
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(data) - known - {"format"})
        if unknown:
            raise CheckpointError(f"{source}: unknown entries {unknown}; use the version that wrote it")
        values = {name: data[name] for name in known if name in data}
        try:
            values["checkpoints"] = [CheckpointRecord(**record) for record in values.get("checkpoints", [])]
        except TypeError as error:
            raise CheckpointError(
                f"{source}: an unknown checkpoint record ({error}); use the version that wrote it"
            ) from error
        return cls(**values)

    def set_checkpoints(self, records: list[CheckpointRecord]) -> None:
        """Replace the checkpoints; ``best_epoch`` and ``best_reward`` follow."""
        self.checkpoints = records
        best = self.best_checkpoint()
        self.best_epoch = None if best is None else best.epoch
        self.best_reward = None if best is None else best.reward

    @property
    def committed_epoch(self) -> int:
        """The newest epoch that is committed: 0 is what comes before the first, -1 means nothing at all."""
        return -1 if self.last_checkpoint() is None else self.epochs_done

    @property
    def has_trained(self) -> bool:
        """Whether there is a checkpoint of weights that the run has trained."""
        return any(record.trained for record in self.checkpoints)

    def last_checkpoint(self) -> CheckpointRecord | None:
        """The newest saved epoch."""
        return max(self.checkpoints, key=lambda record: record.epoch, default=None)

    def best_checkpoint(self) -> CheckpointRecord | None:
        """What ``checkpoint: best`` serves: ``best_measured``, or None if all that was trained has no reward yet."""
        measured = any(record.trained and record.reward is not None for record in self.checkpoints)
        return self.best_measured() if measured or not self.has_trained else None

    def best_measured(self) -> CheckpointRecord | None:
        """The saved epoch with the highest reward, the earliest of equals, also if it is what the run began with."""
        measured = [record for record in self.checkpoints if record.reward is not None]
        return max(measured, key=lambda record: (record.reward, -record.epoch), default=None)
