"""Saved states, from which a model in memory can be rebuilt, below ``<store>/states/<model_id>/<seq>``."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nat_plugin_evsys.engine.checkpoint_loading import load_checkpoint
from nat_plugin_evsys.engine.checkpoints import read_checkpoint, save_checkpoint
from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.runtime.bases import SharedBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StatePolicy:
    """When a state is to be saved: after ``max(least_seconds, cost_factor x seconds of the last one)`` of engine time.

    This limits how much a killed server must repeat, and the share of time spent on saving.
    """

    least_seconds: float = 10.0
    cost_factor: float = 20.0

    def due(self, engine_seconds: float, last_took: float) -> bool:
        """Whether to save, given the engine seconds since the last save and how long that took."""
        return engine_seconds >= max(self.least_seconds, self.cost_factor * last_took)


class SavedStates:
    """Weights and moments of models on disk, each named by the sequence number of the last operation in them.

    Args:
        root: the directory; created at the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, model_id: str, seq: int, model: TrainableModel) -> tuple[str, float]:
        """Write the state after operation ``seq``; returns the directory's name and the seconds it took.

        Raises:
            CheckpointError: the disk refused the write.
        """
        started = time.perf_counter()
        directory = save_checkpoint(self.root / model_id, str(seq), model, kind="training")
        return directory.name, time.perf_counter() - started

    def load_into(self, model: TrainableModel, model_id: str, name: str) -> None:
        """Put a state into ``model``.

        Raises:
            CheckpointError: missing, torn, or of another shape.
        """
        load_checkpoint(self.root / model_id / name, model, with_optimizer=True)

    def open(self, shared: SharedBase, model_id: str, name: str) -> TrainableModel:
        """A model of the state's LoRA shape, with its weights and moments.

        Raises:
            CheckpointError: missing, torn, or made for another base model.
        """
        return shared.train_checkpoint(read_checkpoint(self.root / model_id / name), with_optimizer=True)

    def keep_only(self, model_id: str, name: str) -> None:
        """Delete the older states of a model."""
        for path in (self.root / model_id).glob("*"):
            if path.name != name:
                shutil.rmtree(path, ignore_errors=True)

    def forget(self, model_id: str) -> None:
        """Delete all states of a model."""
        shutil.rmtree(self.root / model_id, ignore_errors=True)

    def model_ids(self) -> list[str]:
        """The models that have a state."""
        return [path.name for path in self.root.iterdir()] if self.root.is_dir() else []
