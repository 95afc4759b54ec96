"""The URL of a server, as settings name one."""

from __future__ import annotations

from urllib.parse import urlsplit


def server_url(setting: str, value: str | None, example: str = "http://127.0.0.1:8000") -> str | None:
    """``value`` without slashes at its end, if it is scheme, host, port and path alone.

    Args:
        setting: its name, for errors.

    Raises:
        ValueError: it is not. A URL in which there may be a key or a password is not shown.
    """
    if value is None:
        return None
    if any(mark in value for mark in "@?#"):
        raise ValueError(f"{setting} must be scheme, host, port and path alone; put a key into the environment")
    if not _leads_to_a_server(value):
        raise ValueError(f"{setting} is {value!r}; it must be a URL such as {example}")
    return value.rstrip("/")


def _leads_to_a_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that are no address, or a port that is no number
        return False
