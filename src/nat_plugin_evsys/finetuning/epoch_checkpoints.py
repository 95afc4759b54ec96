"""Epoch checkpoints: saving, committing, pruning, and loading them in a resumed run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from nat_plugin_evsys.errors import CheckpointError, EvsysError
from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.policy.weights import check_place
from nat_plugin_evsys.runs import is_service_path
from nat_plugin_evsys.runs.state import CheckpointRecord

logger = logging.getLogger(__name__)


async def reload(policies: Sequence[EpochCheckpoints], *, previous: bool) -> str:
    """Load the last epoch of all policies of a run and publish them; returns where that of the first is.

    Only once they are loaded is anything removed that came after them.

    Args:
        policies: the first one's state commits the run; the others are brought to its epoch.
        previous: where a checkpoint is gone or torn, go back to the newest epoch before whose are whole.

    Raises:
        CheckpointError: gone, torn, or another model's; says what to type.
        ConfigError: the run's checkpoints are on a service and there is no base_url, or vice versa.
    """
    own, *others = (each.books for each in policies)
    newest = own.state.epochs_done
    first: CheckpointError | None = None
    while True:
        epoch = own.state.epochs_done
        try:
            for books in others:
                books.go_to(epoch)
            source, *_ = [await each.load_committed() for each in policies]
            break
        except CheckpointError as error:
            if not previous:
                raise CheckpointError(f"{error}. {own.run_dir.history.how_to_go_back(epoch)}") from error
            first = first or error
            logger.warning("%s", error)
            if not own.fall_back():
                raise first from None
    for books in (own, *others):
        books.rewind()
    if lost := newest - epoch:
        logger.warning("continuing after epoch %d: %d epoch%s will run again", epoch, lost, "" if lost == 1 else "s")
    return source


class EpochCheckpoints:
    """Checkpoints of one policy of a run.

    Args:
        keep: how many to keep in addition to the last and the best.
    """

    def __init__(self, policy: Policy, books: RunBooks, keep: int) -> None:
        self._policy = policy
        self.books = books
        self._keep = keep

    async def save(self, epochs_done: int, reward: float | None, curriculum: dict[str, Any]) -> None:
        """Save weights with optimizer state; they are written before the state file names them."""
        self.books.run_dir.check_present()
        name = f"epoch-{epochs_done:04d}"
        backend = self._policy.backend
        state = await backend.save_full_state(name)
        # On disk one directory is both; a service samples from other checkpoints than it trains from.
        adapter = await backend.save_for_sampler(name) if is_service_path(state) else state
        stale = self.books.commit(epochs_done, name, adapter, state, reward, curriculum=curriculum, keep=self._keep)
        for path in stale:
            await self._delete(path)

    async def load_committed(self) -> str:
        """Load the last epoch's weights and optimizer state and publish them; returns their location.

        Raises:
            CheckpointError: gone, torn, or another model's.
            ConfigError: the run's checkpoints are on a service and there is no base_url, or vice versa.
        """
        record = self.books.state.last_checkpoint()
        if record is None or record.epoch != self.books.state.epochs_done:
            raise CheckpointError(
                f"{self.books.run_dir.path} has no checkpoint of epoch {self.books.state.epochs_done}"
            )
        return await self.load(record)

    async def load(self, record: CheckpointRecord) -> str:
        """Load a checkpoint's weights and optimizer state and publish them; raises as ``load_committed``."""
        source = self.books.run_dir.locate(record.training_state or record.adapter)
        check_place(source, self._policy.config.base_url)
        await self._policy.backend.load_state(str(source), with_optimizer=True)
        await self._policy.publish()
        return str(source)

    async def _delete(self, path: str) -> None:
        try:
            await self._policy.backend.delete_checkpoint(path)
        except EvsysError as error:
            logger.warning("keep_checkpoints: %s stays on the service: %s", path, error)
