"""What ``nat evsys status`` prints. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def status_table(status: dict[str, Any]) -> str:
    """The answer of ``GET /status`` as text: lines for the server, tables of its replicas and the caller's models."""
    lines = [
        f"base models   {', '.join(status['base_models'])}",
        f"queue         {_counts(status['queued'])}",
        f"sampling      {_counts(status['sampling'])}",
        f"tokens/s      {_counts(status['tokens_per_second'], 1)}",
        f"tokens        {_counts(status['tokens'])}",
        f"memory        {', '.join(f'{name} {_bytes(size)}' for name, size in status['memory'].items()) or '-'}",
        f"sessions      {status['sessions']}   clients waiting {status['long_polls']}   up {_time(status['uptime'])}",
        "",
    ]
    if status.get("replicas"):
        lines += [*_replicas(status["replicas"]), ""]
    if not status["models"]:
        return "\n".join([*lines, "no models"])
    head = ("MODEL", "BASE", "STATE", "STEP", "QUEUED", "SECONDS", "TOKENS")
    rows = [
        (
            model["model_id"],
            model["base_model"],
            model["state"],
            _text(model["step"]),
            _text(model["queued"]),
            _text(model["engine_seconds"], 1),
            _text(model["tokens_trained"]),
        )
        for model in status["models"]
    ]
    return "\n".join([*lines, *_columns([head, *rows])])


def _replicas(replicas: Sequence[dict[str, Any]]) -> list[str]:
    head = ("REPLICA", "BASE", "STATE", "HOST", "DEVICE", "MEMORY", "TOKENS/S", "TOKENS", "SAMPLING", "RESTARTS")
    rows = [
        (
            str(each["replica"]),
            each["base_model"],
            "straggles" if each["straggles"] else each["state"],
            each["host"] or "-",
            each["device"] or "-",
            "-" if each["memory"] is None else _bytes(each["memory"]),
            _text(each["tokens_per_second"]),
            _text(each["tokens"]),
            _text(each["sampling"]),
            _text(each["restarts"]),
        )
        for each in replicas
    ]
    return _columns([head, *rows])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _counts(values: dict[str, float], digits: int = 0) -> str:
    return ", ".join(f"{name} {_text(value, digits)}" for name, value in values.items()) or "-"


def _text(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _bytes(size: float) -> str:
    for unit in _UNITS[:-1]:
        if size < 1024:
            return f"{size:.{0 if unit == 'B' else 1}f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def _time(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
