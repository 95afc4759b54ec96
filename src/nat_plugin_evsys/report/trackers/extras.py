"""Each tracker is an extra of this package."""

from __future__ import annotations

import importlib.util

from nat_plugin_evsys.errors import ConfigError


def require_extra(module: str, extra: str) -> None:
    """Refuse a tracker whose library is not installed.

    Raises:
        ConfigError: names what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"trackers: `{extra}` is not installed; pip install 'nat_plugin_evsys[{extra}]'")
