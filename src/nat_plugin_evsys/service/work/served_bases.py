"""The base models that a server was started with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from nat_plugin_evsys.engine.checkpoints import CheckpointInfo
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.errors import CheckpointError, ConfigError, ModelError
from nat_plugin_evsys.replicas.base import Replicas, ReplicatedBase
from nat_plugin_evsys.runtime.bases import BaseModels, SharedBase


class ServedBases:
    """Loads the models once and finds them by name, or by what a checkpoint was made for.

    Args:
        names: ``builtin/…``, directories or hub ids.
        replicas: of each model, on a Ray cluster; None loads it into this process.
        options: of ``open_here``.
    """

    def __init__(self, names: Sequence[str], replicas: Replicas | None = None, **options: Any) -> None:
        self.names = list(dict.fromkeys(names))
        if replicas is None:
            self._models = BaseModels(**options)
        else:
            self._models = BaseModels(ReplicatedBase.open, replicas=replicas, **options)
        self._shared: dict[str, SharedBase] = {}

    def load(self) -> list[SharedBase]:
        """Load all.

        Raises:
            ModelError: one cannot be loaded.
        """
        for name in self.names:
            shared = self._models.get(name)
            if shared not in self._shared.values():
                self._shared[name] = shared
        return list(self._shared.values())

    def all(self) -> list[SharedBase]:
        """The loaded models."""
        return list(self._shared.values())

    def models(self) -> list[BaseModel]:
        """The base models themselves."""
        return [shared.base for shared in self._shared.values()]

    def replicas(self) -> list[dict[str, Any]]:
        """The state of each replica of each model; empty without a cluster. See ``ReplicaPool.status``."""
        return [
            {"base_model": shared.base.name, **facts} for shared in self._replicated() for facts in shared.pool.status()
        ]

    def scale(self, replicas: int, base_model: str | None) -> None:
        """Have so many replicas of a model; None is every model. See ``ReplicaPool.scale``.

        Raises:
            ConfigError: the models are not on a cluster, or it is too small.
            ModelError: the model is not served.
        """
        replicated = self._replicated()
        if not replicated:
            raise ConfigError("this server computes in its own process; start it with --ray --replicas N to scale it")
        wanted = None if base_model is None else self.get(base_model)
        for shared in replicated:
            if wanted in (None, shared):
                shared.pool.scale(replicas)

    def _replicated(self) -> list[ReplicatedBase]:
        return [shared for shared in self._shared.values() if isinstance(shared, ReplicatedBase)]

    def find(self, name: str) -> SharedBase | None:
        """The model of that name, or of that directory however it is spelled."""
        if name in self._shared:
            return self._shared[name]
        place = _place(name)
        return next((shared for key, shared in self._shared.items() if place and _place(key) == place), None)

    def get(self, name: str) -> SharedBase:
        """``find``.

        Raises:
            ModelError: it is not served.
        """
        shared = self.find(name)
        if shared is None:
            raise ModelError(f"base_model {name!r} is not served here; choose one of {', '.join(self._shared)}")
        return shared

    def of_checkpoint(self, info: CheckpointInfo) -> SharedBase:
        """The model that a checkpoint was made for, whatever its name was then.

        Raises:
            CheckpointError: it is not served.
        """
        for shared in self._shared.values():
            if shared.base.identity == info.base_identity:
                return shared
        raise CheckpointError(
            f"the checkpoint was made for base model {info.base_model!r}, which is not served here; served are "
            f"{', '.join(self._shared)}"
        )

    def close(self) -> None:
        """Close the samplers and release the models."""
        self._models.close()


def _place(name: str) -> str | None:
    """The real path of a directory, or None if it is not a directory."""
    try:
        return os.path.realpath(name, strict=True)
    except (OSError, ValueError):
        return None
