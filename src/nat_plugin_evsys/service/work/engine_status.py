"""Facts about models and the engine, as ``get_info``, ``/metrics`` and ``nat evsys status`` show them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.service.work.hosting import Hosting
from nat_plugin_evsys.service.work.samplers import Samplers
from nat_plugin_evsys.service.work.sampling import SampleRunner
from nat_plugin_evsys.service.work.served_bases import ServedBases

if TYPE_CHECKING:
    from nat_plugin_evsys.service.store.rows import ModelRow
    from nat_plugin_evsys.service.store.store import Store


def model_facts(row: ModelRow, base: BaseModel) -> dict[str, Any]:
    """Tinker's ``GetInfoResponse``. ``tokenizer_id`` is an absolute path if the model is a directory."""
    name = getattr(base.tokenizer, "name_or_path", None) or base.name
    tokenizer = str(Path(name).expanduser().absolute()) if os.path.isdir(os.path.expanduser(name)) else name
    return {
        "type": "get_info",
        "model_data": {
            "arch": base.model.config.model_type,
            "model_name": row.base_model,
            "tokenizer_id": tokenizer,
        },
        "model_id": row.model_id,
        "is_lora": True,
        "lora_rank": row.lora_rank,
        "model_name": row.base_model,
        "optimizer_config": {"type": "adamw"},
    }


def engine_status(
    store: Store, hosting: Hosting, sampling: SampleRunner, samplers: Samplers, bases: ServedBases
) -> dict[str, Any]:
    """The engine's activity.

    Returns:
        ``models``: by model id ``base_model``, ``state`` (loaded, parked), ``step`` (None where unknown, as it has not
        been in memory), ``queued``, ``engine_seconds`` and ``tokens_trained`` since the start; ``seconds``, ``tokens``
        and ``tokens_per_second`` (over a minute) of ``training`` and ``sampling``; ``sampling``: ``requests`` and
        ``sequences`` in flight; ``memory`` in bytes; ``replicas``: see ``ServedBases.replicas``.
    """
    live = {model_id: each for model_id, each in hosting.models().items() if not each.gone}
    execution = hosting.execution
    models = {}
    for row in store.models():
        each = live.get(row.model_id)
        models[row.model_id] = {
            "base_model": row.base_model,
            "state": "loaded" if each is not None and each.model is not None else "parked",
            "step": None if each is None else each.step,
            "queued": 0 if each is None else hosting.queued(each),
            "engine_seconds": 0.0 if each is None else each.engine_seconds,
            "tokens_trained": 0 if each is None else each.tokens_trained,
        }
    requests, sequences = sampling.active()
    return {
        "models": models,
        "seconds": {"training": execution.seconds},
        "tokens": {"trained": execution.throughput.total, "sampled": sampling.throughput.total},
        "tokens_per_second": {"trained": execution.throughput.rate(), "sampled": sampling.throughput.rate()},
        "sampling": {"requests": requests, "sequences": sequences},
        "memory": {**_memory(), "adapters": samplers.memory()},
        "replicas": bases.replicas(),
    }


def _memory() -> dict[str, int]:
    found = {}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["resident"] = pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    if torch.cuda.is_available():
        found["gpu"] = int(torch.cuda.memory_allocated())
    return found
