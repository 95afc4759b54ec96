"""What a model's operations read and write besides the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.service.work.access import CheckpointAccess
from nat_plugin_evsys.service.work.samplers import Samplers
from nat_plugin_evsys.service.work.states import SavedStates

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.store import Store


@dataclass(frozen=True)
class Places:
    """Of one server."""

    store: Store
    checkpoints: CheckpointStore
    access: CheckpointAccess
    states: SavedStates
    samplers: Samplers
