"""The states that a run has committed, one file for each saved epoch: what ``resume: previous`` goes back to.

    states/epoch-0003.json      state.json as it was when epoch 3 was committed

A state says what had happened by then: counts, rewards, checkpoints, of which some may have been deleted since.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import to_json
from nat_plugin_evsys.runs.state import RunState

logger = logging.getLogger(__name__)

_NAME = re.compile(r"epoch-(\d+)\.json")


class StateHistory:
    """The committed states of one run."""

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / "states"

    def add(self, state: RunState) -> None:
        """Keep a state that is about to be committed."""
        self.directory.mkdir(exist_ok=True)
        atomic_write(self._path(state.epochs_done), state_text(state))

    def keep_only(self, epochs: set[int]) -> None:
        """Delete the states of all other epochs."""
        for epoch in set(self.epochs()) - epochs:
            self._path(epoch).unlink(missing_ok=True)

    def epochs(self) -> list[int]:
        """The epochs that have a state, newest first."""
        names = (_NAME.fullmatch(path.name) for path in self.directory.glob("*.json"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def at(self, epoch: int) -> RunState | None:
        """The state of an epoch, if it was kept and can be read."""
        return next((state for state in self._readable(epoch + 1) if state.epochs_done == epoch), None)

    def newest(self, before: int | None = None) -> RunState | None:
        """The newest state that can be read, of an epoch before ``before`` if that is given."""
        return next(self._readable(before), None)

    def how_to_go_back(self, epoch: int) -> str:
        """What to type where the checkpoint of an epoch is gone or torn."""
        older = self.newest(before=epoch)
        if older is None:
            return "The run has no earlier checkpoint; set resume: false to start again"
        return (
            f"To resume from the newest whole checkpoint before it (of epoch {older.epochs_done}; later epochs run "
            "again), set the trainer's resume: previous"
        )

    def _readable(self, before: int | None) -> Iterator[RunState]:
        for epoch in self.epochs():
            if before is None or epoch < before:
                try:
                    yield read_state(self._path(epoch))
                except CheckpointError as error:
                    logger.warning("%s", error)

    def _path(self, epoch: int) -> Path:
        return self.directory / f"epoch-{epoch:04d}.json"


def state_text(state: RunState) -> str:
    """The content of a state's file."""
    return to_json(state.to_dict(), indent=1) + "\n"


def read_state(path: Path) -> RunState:
    """The state in a file.

    Raises:
        CheckpointError: missing, torn, or another version's.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not a run: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return RunState.from_dict(data, path)
