"""The directory of one ``nat finetune``.

    <output_dir>/latest                     name of the newest run
    <output_dir>/run-YYYYmmdd-HHMMSS[-n]/
        config.yml       the resolved config, secrets redacted
        state.json       RunState: written whole at the end of each epoch
        states/          the state of each saved epoch (runs/history.py)
        metrics.jsonl    one row per epoch, validation and warm start
        jobs.jsonl       the ledger of training jobs
        rewards.png      the reward curve
        report.html      the report
        environment.json versions and commands (runs/environment.py)
        summary.json     the result
        checkpoints/     weights
        rollouts/        the rollouts (runs/rollouts.py)
        policies/        further policies that the run trains (runs/policies.py)

``state.json`` is the commit: what it does not name did not happen, whatever else is in the directory.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from nat_plugin_evsys.errors import CheckpointError, ConfigError
from nat_plugin_evsys.files import atomic_write, remove_directory, remove_temporaries, restore_set_aside
from nat_plugin_evsys.runs.history import StateHistory, read_state, state_text
from nat_plugin_evsys.runs.lock import RunLock
from nat_plugin_evsys.runs.rollouts import RolloutFiles
from nat_plugin_evsys.runs.settings import changed_settings, redact, settings_hash
from nat_plugin_evsys.runs.state import CheckpointRecord, RunState

logger = logging.getLogger(__name__)


class RunDirectory:
    """One run on disk: its paths, its state and its checkpoints."""

    LATEST: ClassVar[str] = "latest"
    STATE: ClassVar[str] = "state.json"

    def __init__(self, path: Path, state: RunState) -> None:
        self.path = Path(os.path.abspath(path))
        self.state = state
        self.checkpoints_dir = self.path / "checkpoints"
        self.state_path = self.path / self.STATE
        self.config_path = self.path / "config.yml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.plot_path = self.path / "rewards.png"
        self.summary_path = self.path / "summary.json"
        self.report_path = self.path / "report.html"
        self.rollouts = RolloutFiles(self.path)
        self.history = StateHistory(self.path)
        self._lock = RunLock(self.path)

    # -- finding ----------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, output_dir: Path | str, config: Mapping[str, Any] | None = None) -> RunDirectory:
        """A new run, which `latest` then names.

        Args:
            config: the resolved config in JSON's types; it is written without its secrets.

        Raises:
            ConfigError: ``output_dir`` cannot be written.
        """
        parent = Path(os.path.abspath(output_dir))
        try:
            run = cls(_new_directory(parent), RunState())
            run.checkpoints_dir.mkdir()
            run.lock()
            if config is not None:
                atomic_write(run.config_path, yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True))
                run.state.config_hash = settings_hash(config)
            run.save_state()
            atomic_write(parent / cls.LATEST, run.path.name + "\n")
        except OSError as error:
            raise ConfigError(f"finetuning.output_dir: cannot write to {parent}: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path | str, *, previous: bool = False) -> RunDirectory:
        """An existing run.

        Args:
            previous: if its state cannot be read, take the newest one in ``states/`` that can.

        Raises:
            CheckpointError: not a run, or its state cannot be read; says what to type.
        """
        source = Path(path) / cls.STATE
        try:
            return cls(Path(path), read_state(source))
        except CheckpointError as error:
            older = StateHistory(Path(path)).newest()
            if older is None:
                raise
            if not previous:
                raise CheckpointError(
                    f"{error}. The newest state that can be read is that of epoch {older.epochs_done}; to resume from "
                    "it, set the trainer's resume: previous"
                ) from error
            logger.warning("%s; continuing after epoch %d, which is the newest whole state", error, older.epochs_done)
            return cls(Path(path), older)

    @classmethod
    def newest(cls, output_dir: Path | str, *, previous: bool = False) -> RunDirectory | None:
        """The run that `latest` names; without that file, the run with the newest name. None when there is none.

        Raises:
            CheckpointError: as ``open``.
        """
        parent = Path(output_dir)
        try:
            name = (parent / cls.LATEST).read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            name = ""
        if name and (parent / name / cls.STATE).is_file():
            return cls.open(parent / name, previous=previous)
        paths = cls.paths(parent)
        return cls.open(paths[-1], previous=previous) if paths else None

    @classmethod
    def all(cls, output_dir: Path | str) -> list[RunDirectory]:
        """All runs whose state can be read, oldest first. The others are named in the log."""
        found = []
        for path in cls.paths(output_dir):
            try:
                found.append(cls.open(path))
            except CheckpointError as error:
                logger.warning("%s", error)
        return found

    @classmethod
    def paths(cls, output_dir: Path | str) -> list[Path]:
        """The directories of all runs, oldest first, whether their states can be read or not."""
        return sorted((path.parent for path in Path(output_dir).glob(f"run-*/{cls.STATE}")), key=_age)

    # -- state ------------------------------------------------------------------------------------------------------

    def save_state(self) -> None:
        """Commit ``state``. Call it last: after the checkpoint and the metrics of the epoch are on disk."""
        self._lock.check()
        atomic_write(self.state_path, state_text(self.state))

    def lock(self) -> None:
        """Hold this run until ``unlock`` or the end of the process; raises ConfigError if another process does."""
        self._lock.hold()

    def unlock(self) -> None:
        """Let another process resume this run."""
        self._lock.release()

    def is_locked(self) -> bool:
        """Whether a process holds this run."""
        return self._lock.is_held()

    def check_present(self) -> None:
        """Raises RunLostError if the directory was deleted or replaced while this process held it."""
        self._lock.check()

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Refuse settings that would make this a different run.

        Raises:
            ConfigError: lists each setting that changed, with both values.
        """
        if self.state.config_hash is None or self.state.config_hash == settings_hash(config):
            return
        before = yaml.safe_load(self.config_path.read_text(encoding="utf-8")) if self.config_path.is_file() else {}
        changes = changed_settings(before, config) or [f"{self.config_path} was edited"]
        raise ConfigError(
            f"cannot resume {self.path}: its settings or its data changed ({'; '.join(changes)}); "
            "put them back, or set resume: false to start a new run"
        )

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def record_checkpoint(
        self,
        name: str,
        epoch: int,
        reward: float | None,
        *,
        adapter: Path | str | None = None,
        training_state: Path | str | None = None,
        trained: bool = True,
    ) -> CheckpointRecord:
        """Record a checkpoint that is already on disk. ``save_state`` commits it.

        Args:
            name: the name it was saved under.
            epoch: epochs finished.
            reward: what `best` compares; None if not measured.
            adapter: path or URI of the weights for sampling; default ``checkpoints/<name>``.
            training_state: path or URI of the weights with optimizer state, if any.
            trained: False for what a run starts from; `latest` and `best` ignore runs without a trained one.
        """
        record = CheckpointRecord(
            name=name,
            epoch=epoch,
            reward=reward,
            adapter=self._stored(self.checkpoints_dir / name if adapter is None else adapter),
            training_state=None if training_state is None else self._stored(training_state),
            trained=trained,
        )
        self.state.set_checkpoints([*(old for old in self.state.checkpoints if old.epoch != epoch), record])
        return record

    def prune(self, keep: int) -> list[str]:
        """Forget and delete all checkpoints but the last, the best and the ``keep`` newest others.

        Returns:
            The names of the deleted checkpoints.
        """
        last, best = self.state.last_checkpoint(), self.state.best_measured()
        others = sorted(
            (record for record in self.state.checkpoints if record is not last and record is not best),
            key=lambda record: record.epoch,
        )
        stale = others[: max(0, len(others) - keep)]
        self.state.set_checkpoints([record for record in self.state.checkpoints if record not in stale])
        self.history.add(self.state)
        self.save_state()  # before deleting: what the state names must exist
        self.history.keep_only({record.epoch for record in self.state.checkpoints})
        kept = self._named_paths()
        for record in stale:
            for where in (record.adapter, record.training_state):
                path = None if where is None else self.locate(where)
                if isinstance(path, Path) and path not in kept and path.is_relative_to(self.path) and path.is_dir():
                    remove_directory(path)
        return [record.name for record in stale]

    def forget_missing(self) -> list[str]:
        """Forget checkpoints that someone has deleted from the disk; returns their names."""
        missing = [record for record in self.state.checkpoints if not self._is_there(record)]
        self.state.set_checkpoints([record for record in self.state.checkpoints if record not in missing])
        return [record.name for record in missing]

    def restore_checkpoints(self) -> None:
        """Bring back those that were set aside when the process died in the middle of replacing them."""
        for path in self._named_paths():
            if isinstance(path, Path):
                restore_set_aside(path)

    def discard_unrecorded(self) -> list[Path]:
        """Delete what an interrupted epoch left behind: checkpoints that the state does not name, temporaries.

        For a run being resumed, whose other files ``state`` decides about, too.

        Returns:
            The checkpoints that were deleted.
        """
        self.restore_checkpoints()
        kept = self._named_paths()
        remove_temporaries(self.path)
        found = [path.parent for path in sorted(self.checkpoints_dir.rglob("manifest.json"))]
        stray = [path for path in found if path not in kept]
        for path in stray:
            remove_directory(path)
        committed = [record.epoch for record in self.state.checkpoints]
        self.history.keep_only(set(committed))
        return stray

    def locate(self, where: str) -> Path | str:
        """The absolute path of a recorded location, or the location itself if it is a URI."""
        return where if "://" in where else Path(os.path.abspath(self.path / where))

    def _stored(self, where: Path | str) -> str:
        if isinstance(where, str) and "://" in where:
            return where
        absolute = Path(os.path.abspath(where))
        inside = absolute.is_relative_to(self.path)
        return str(absolute.relative_to(self.path) if inside else absolute)

    def _is_there(self, record: CheckpointRecord) -> bool:
        places = [self.locate(place) for place in (record.adapter, record.training_state) if place is not None]
        return all(place.is_dir() for place in places if isinstance(place, Path))

    def _named_paths(self) -> set[Path | str]:
        places = [place for record in self.state.checkpoints for place in (record.adapter, record.training_state)]
        return {self.locate(place) for place in places if place is not None}


def _new_directory(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("run-%Y%m%d-%H%M%S")
    number = 1
    while True:
        path = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1


def _age(path: Path) -> tuple[str, int]:
    """Sorts ``run-…-10`` after ``run-…-2``."""
    parts = path.name.split("-")
    return "-".join(parts[:3]), int(parts[3]) if len(parts) > 3 and parts[3].isdigit() else 1
