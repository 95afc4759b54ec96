"""What a replica answered, or why it did not."""

from __future__ import annotations

from typing import Any

from nat_plugin_evsys.errors import EvsysError, OperationCancelled, ReplicaError

RETRIES = 5
"""How often Ray runs a call again whose replica has died, so that a call that kills its replica ends."""


def answer(call: Any) -> Any:
    """The result of a call, waited for.

    Raises:
        Exception: the replica's own error, or see ``readable``.
    """
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayError as exc:
        raise readable(exc) from exc


def readable(error: Exception) -> Exception:
    """What a call of a replica failed of: its own error, or that it died."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, EvsysError | OperationCancelled):
        return cause
    import ray

    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return ReplicaError(
            f"a replica died {RETRIES + 1} times in the same call, or cannot be started again: {_last_line(error)}; "
            "`nat evsys status` shows the replicas, and Ray's logs are in /tmp/ray/session_latest/logs there"
        )
    return ReplicaError(f"a replica failed: {_last_line(cause or error)}")


def _last_line(error: Exception) -> str:
    """Where Ray quotes the error of a replica that could not start, that is the error itself."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1].strip()[:300] if text else ''}"
