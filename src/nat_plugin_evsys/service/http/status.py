"""The state of the server as ``GET /status``, ``nat evsys status`` and ``/metrics`` show it."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from nat_plugin_evsys.service.http.context import ServiceContext

_STARTED = time.monotonic()


def server_status(context: ServiceContext, owner: str | None) -> dict[str, Any]:
    """The server's activity. Totals are over all keys, ``models`` only the owner's; newest first, the loaded ones
    before the parked.

    Args:
        owner: None leaves ``models`` out.
    """
    engine, counts = context.engine.status(), context.store.counts()
    states = Counter(facts["state"] for facts in engine["models"].values())
    chat = context.metrics.chat_tokens
    return {
        "base_models": [base.name for base in context.engine.base_models()],
        "queued": counts["queued"],
        "sessions": counts["sessions"],
        "model_states": {"loaded": states["loaded"], "parked": states["parked"]},
        "sampling": engine["sampling"],
        "seconds": engine["seconds"],
        "tokens": {**engine["tokens"], "chat": chat.total},
        "tokens_per_second": {**engine["tokens_per_second"], "chat": chat.rate()},
        "memory": engine["memory"],
        "replicas": engine["replicas"],
        "long_polls": context.pending.waiting,
        "uptime": time.monotonic() - _STARTED,
        "models": [] if owner is None else _models(context, engine["models"], owner),
    }


def _models(context: ServiceContext, facts: dict[str, dict[str, Any]], owner: str) -> list[dict[str, Any]]:
    own = [row for row in reversed(context.store.models(owner=owner)) if row.model_id in facts]
    own.sort(key=lambda row: facts[row.model_id]["state"] != "loaded")
    return [{"model_id": row.model_id, **facts[row.model_id]} for row in own]
