"""Checks of arguments that the engine does not check itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from tinker import types

from nat_plugin_evsys.errors import ConfigError, DataError, UnsupportedError
from nat_plugin_evsys.runtime import defaults

if TYPE_CHECKING:
    import tinker

MIN_TTL_SECONDS = 3600
MAX_TTL_SECONDS = 10 * 365 * 24 * 3600


def check_int(name: str, value: Any, *, least: int, error: type[Exception] = ConfigError) -> int:
    """``value`` if it is an integer of at least ``least`` (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise error(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def check_seed(seed: Any) -> int | None:
    """An integer or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ConfigError(f"seed must be an integer or None (a random one), got {seed!r}")
    return seed


def check_flag(name: str, value: Any) -> bool:
    """A bool, not just something truthy."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}")
    return value


def check_text(name: str, value: Any) -> str:
    """A non-empty string."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a non-empty string, got {value!r}")
    return value


def check_metadata(user_metadata: Any) -> dict[str, str]:
    """A copy; Tinker's metadata maps text to text."""
    if user_metadata is None:
        return {}
    good = isinstance(user_metadata, Mapping) and all(
        isinstance(key, str) and isinstance(value, str) for key, value in user_metadata.items()
    )
    if not good:
        raise ConfigError(f"user_metadata must be a dict from strings to strings, got {user_metadata!r}")
    return dict(user_metadata)


def check_ttl(ttl_seconds: Any) -> int | None:
    """None (never expires), or one hour to ten years."""
    if ttl_seconds is None:
        return None
    whole = isinstance(ttl_seconds, int) and not isinstance(ttl_seconds, bool)
    seconds: int = ttl_seconds
    if not whole or not MIN_TTL_SECONDS <= seconds <= MAX_TTL_SECONDS:
        raise ConfigError(
            f"ttl_seconds must be None (never expires) or an integer from {MIN_TTL_SECONDS} (one hour) to "
            f"{MAX_TTL_SECONDS} (ten years), got {ttl_seconds!r}"
        )
    return seconds


def check_data(data: Any) -> list[tinker.Datum]:
    """A copy of the list; the engine checks each Datum."""
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Sequence):
        raise DataError(f"data is a {type(data).__name__}; give a list of tinker.Datum")
    return list(data)


def check_loss_fn(loss_fn: Any) -> str:
    """A string; the engine knows which."""
    if not isinstance(loss_fn, str):
        raise DataError(f"loss_fn is a {type(loss_fn).__name__}; give a name such as 'cross_entropy'")
    return loss_fn


def check_loss_fn_config(config: Any) -> dict[str, float] | None:
    """A copy of the mapping, or None; the engine checks the keys and values."""
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError(f"loss_fn_config is a {type(config).__name__}; give a dict or None")
    return None if config is None else dict(config)


def check_optimizer(optimizer: Any) -> None:
    """None or AdamW."""
    if optimizer is not None and not isinstance(optimizer, types.AdamOptimizerConfig):
        kind = getattr(optimizer, "type", type(optimizer).__name__)
        raise UnsupportedError(f"optimizer {kind!r} is not offered: AdamW is the only one; leave it out")


def check_api_key(api_key: Any) -> None:
    """None or text: programs for services pass one. The engine in this process ignores it."""
    if api_key is not None:
        check_text("api_key", api_key)


def check_retry_config(retry_config: Any) -> None:
    """None or Tinker's RetryConfig. A call inside one process has no connection to lose."""
    from tinker.lib.retry_handler import RetryConfig

    if retry_config is not None and not isinstance(retry_config, RetryConfig):
        raise ConfigError(f"retry_config is a {type(retry_config).__name__}; give types.RetryConfig, or leave it out")


def check_lora_config(given: Any) -> types.LoraConfig:
    """A LoraConfig, or a mapping of its fields, all optional."""
    if isinstance(given, types.LoraConfig):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"lora_config must be a dict such as {{'rank': 32}}, got {given!r}")
    try:
        return types.LoraConfig.model_validate({"rank": defaults.RANK, **(given or {})})
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"lora_config {given!r} is refused: {where}: {first['msg']}") from exc


_WHY_REFUSED = {
    "base_url": "this client is the engine in this process; for a server use tinker.ServiceClient(base_url=…)",
    "default_headers_overrides": "nothing is sent over HTTP",
    "project_id": "there are no projects here; use another store directory",
    "display_name": "there is no console to display it; use user_metadata",
    "weights_access_token": "there are no accounts here; checkpoints are read from the store directory",
    "record_stability_info": "it serves the loss stable_reinforce, whose formula is not public",
    "age_encryption_recipients": "weights are exported as they are; encrypt the files",
    "loss_type_input": "the loss always receives logprobs; leave it out",
}


def refuse_options(**options: Any) -> None:
    """Raises UnsupportedError for the first option that was given (is neither None, 0 nor False)."""
    for name, value in options.items():
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise UnsupportedError(f"{name} is not offered: {_WHY_REFUSED[name]}")
