"""``loss_fn_config``: the keys that each loss takes, their defaults, and the check. The formulas are in the engine.

``ppo``, ``cispo`` and ``gspo`` take absolute bounds of the ratio. Standard library only: a YAML is checked by it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.runtime import defaults

LOSS_FN_CONFIGS: dict[str, dict[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": defaults.DRO_BETA},
    "gspo": {"clip_low_threshold": 1 - 3e-4, "clip_high_threshold": 1 + 4e-4},
}
"""Loss -> key -> default."""


def resolve_loss_fn_config(loss_fn: str, config: Mapping[str, float | str] | None) -> dict[str, float]:
    """The config with defaults filled in.

    Raises:
        ConfigError: an unknown key, a value that is not a finite non-negative number, or low above high.
    """
    known = LOSS_FN_CONFIGS[loss_fn]
    given = dict(config or {})
    unknown = sorted(set(given) - set(known))
    if unknown:
        takes = ", ".join(known) or "no keys at all"
        raise ConfigError(f"loss_fn_config of {loss_fn} has the unknown key {unknown[0]!r}; it takes {takes}")
    merged = dict(known)
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise ConfigError(f"loss_fn_config of {loss_fn}: {key} is {value!r}; give a finite number >= 0")
        merged[key] = value
    if "clip_low_threshold" in merged and merged["clip_low_threshold"] > merged["clip_high_threshold"]:
        raise ConfigError(
            f"loss_fn_config of {loss_fn}: clip_low_threshold {merged['clip_low_threshold']} is above "
            f"clip_high_threshold {merged['clip_high_threshold']}"
        )
    return merged
