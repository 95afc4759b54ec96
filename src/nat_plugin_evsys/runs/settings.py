"""A run's resolved config as it is stored: without secrets, and comparable with the next run's."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nat_plugin_evsys.json_lines import jsonable, to_json

REDACTED = "<redacted>"

_SECRET_KEY = re.compile(
    r"^key$|(api|access|secret|private|auth|account|signing|encryption)[_-]?keys?$"
    r"|(^|[_-])(token|secrets?|passwords?|passwd|pwd|passphrases?|authorization|credentials?|cookies?)$"
    r"|(api|access|auth|refresh|bearer|secret)[_-]?tokens$",  # not max_tokens
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\b(?:Bearer\s+\S+|sk-[\w-]{16,}|hf_\w{16,}|tml-[\w-]{12,}|nvapi-[\w-]{16,}|gh[pousr]_\w{16,})"
)
_URL_USER = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)

NOT_COMPARED = (
    "general.*",
    "finetuning.num_epochs",
    "finetuning.output_dir",
    "finetuning.run_configuration*",
    "eval.general.output*",
    "eval.general.max_concurrency",
    "trainers.*.resume",
    "trainers.*.progress",
    "trainers.*.trackers",
    "trainers.*.keep_checkpoints",
    "trainers.*.keep_rollouts",
    "trainers.*.validation_interval",
    "trainers.*.score_training_rows",
    "trajectory_builders.*.max_concurrency",
    "trajectory_builders.*.rollout_timeout",
    "trajectory_builders.*.evaluator_timeout",
    "trainer_adapters.*.save_datums",
    "llms.*.base_url",
    "llms.*.api_key_env",
    "llms.*.checkpoint",
    "llms.*.output_dir",
    "llms.*.host",
    "llms.*.port",
    "llms.*.api_key",
    "llms.*.device",
    "llms.*.request_timeout",
    "llms.*.max_batch_size",
)
"""Settings that may change between a run and its resumption: they say how long, where and how fast, not what."""


def redact(config: Any) -> Any:
    """``config`` in JSON's types with every secret replaced: by the name of a key above it, or by its own well-known
    shape."""
    return _redact(jsonable(config), False)


def _redact(value: Any, secret: bool) -> Any:
    if isinstance(value, dict):
        return {name: _redact(item, secret or bool(_SECRET_KEY.search(name))) for name, item in value.items()}
    if isinstance(value, list):
        return [_redact(item, secret) for item in value]
    if isinstance(value, str) and value:
        if secret:
            return REDACTED
        return _URL_USER.sub(rf"\g<scheme>{REDACTED}@", _SECRET_VALUE.sub(REDACTED, value))
    return value


def flat_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``{"finetuning.reward_function.name": …}``: every setting that has a value, secrets redacted."""
    return dict(sorted(_flatten(redact(config), "")))


def compared_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``{"finetuning.reward_function.name": …}``: the settings that decide what a run computes, secrets redacted."""
    return {name: value for name, value in flat_settings(config).items() if not _is_free(name)}


def settings_hash(config: Mapping[str, Any]) -> str:
    """A hash of ``compared_settings``."""
    return hashlib.sha256(to_json(compared_settings(config)).encode()).hexdigest()[:16]


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each compared setting that differs: ``name: was A, is B``."""
    old, new = compared_settings(before), compared_settings(now)
    return [
        f"{name}: was {_show(old, name)}, is {_show(new, name)}"
        for name in sorted(old.keys() | new.keys())
        if name not in old or name not in new or old[name] != new[name]
    ]


def _show(settings: Mapping[str, Any], name: str) -> str:
    return to_json(settings[name]) if name in settings else "not set"


def _is_free(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in NOT_COMPARED)


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else key)
    elif value is not None and value != {} and value != []:
        # what is unset by default may be absent in one dump and null in the next
        yield prefix, value
