"""Everything behind the routes of one server, opened and closed in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nat_plugin_evsys.config.serve import ServeConfig
from nat_plugin_evsys.files import others_may_read
from nat_plugin_evsys.replicas.base import Replicas
from nat_plugin_evsys.replicas.cluster import keep_signal_handlers
from nat_plugin_evsys.runtime.checkpoint_store import CheckpointStore
from nat_plugin_evsys.service.http.auth import Keys
from nat_plugin_evsys.service.http.context import ServiceContext
from nat_plugin_evsys.service.http.pending import Pending
from nat_plugin_evsys.service.http.presence import Presence
from nat_plugin_evsys.service.http.prometheus import ServiceMetrics
from nat_plugin_evsys.service.store.store import Store
from nat_plugin_evsys.service.work.engine import Engine

logger = logging.getLogger(__name__)


@asynccontextmanager
async def running(config: ServeConfig, closing: asyncio.Event) -> AsyncIterator[ServiceContext]:
    """A store, an engine with its models loaded, and what the routes share.

    Args:
        closing: set when the server shuts down.

    Raises:
        ConfigError: the store is another server's, or was written by a newer version.
        ModelError: a base model cannot be loaded.
    """
    store = Store(
        config.store,
        max_queued_per_owner=config.max_queued_per_owner,
        max_queued=config.max_queued,
        max_queued_bytes_per_owner=config.max_queued_bytes_per_owner,
    )
    if others_may_read(store.root):
        logger.warning("other users of this machine can read the store; type: chmod -R go= %s", store.root)
    try:
        metrics = ServiceMetrics()
        pending = Pending(store, metrics, config.poll_seconds)
        checkpoints = CheckpointStore(store.root / "checkpoints")
        engine = _engine(config, store, checkpoints)
        try:
            await asyncio.to_thread(engine.start)
            if config.ray is not None:
                keep_signal_handlers()
            operator = None if config.operator_key is None else config.operator_key.get_secret_value()
            keys = Keys([key.get_secret_value() for key in config.api_keys], operator)
            yield ServiceContext(config, store, checkpoints, engine, keys, pending, Presence(store), metrics, closing)
        finally:
            pending.close()
            logger.info("parking the models")
            await asyncio.to_thread(engine.close, config.shutdown_seconds)
    finally:
        await asyncio.to_thread(store.close)


def _engine(config: ServeConfig, store: Store, checkpoints: CheckpointStore) -> Engine:
    ray = config.ray
    replicas = None
    if ray is not None:
        replicas = Replicas(ray.replicas, ray.cpus_per_replica, ray.gpus_per_replica, ray.address)
    return Engine(
        store,
        checkpoints,
        base_models=config.base_models,
        device=config.device,
        dtype=config.dtype,
        quantization=config.quantization,
        context_length=config.context_length,
        max_batch_size=config.max_batch_size,
        deterministic=config.deterministic,
        cache_dir=config.cache_dir,
        trust_remote_code=config.trust_remote_code,
        retain_operations=config.retain_operations,
        model_bytes=None if config.model_memory_mib is None else config.model_memory_mib << 20,
        replicas=replicas,
    )
