"""Without keys, loopback is the only protection: a web page in a browser on this machine must not get through."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from nat_plugin_evsys.config.serve import is_loopback
from nat_plugin_evsys.errors import Refusal


def refuse_web_pages(headers: Mapping[str, str]) -> None:
    """Reject pages of other sites: browsers say which page a request comes from.

    An ``Origin`` that is no address of this machine is refused, ``null`` among them, which is what sandboxed frames,
    files and redirects send; and what a browser calls ``cross-site`` is refused even without one.

    Raises:
        Refusal: 403.
    """
    origin = headers.get("origin")
    if origin is not None and not _is_local(origin):
        raise Refusal(403, f"Origin {origin[:80]!r} is not this machine: web pages of other sites are not served")
    if headers.get("sec-fetch-site", "").strip().lower() == "cross-site":
        raise Refusal(403, "Sec-Fetch-Site is cross-site: web pages of other sites are not served")


def refuse_foreign_hosts(headers: Mapping[str, str]) -> None:
    """Reject requests for another host name, as from a page whose name was rebound to this address.

    Raises:
        Refusal: 403.
    """
    host = headers.get("host")
    if host is not None and not _is_local(f"//{host}"):
        raise Refusal(
            403, f"Host {host[:80]!r} is not this machine, and the server has no API keys; start it with --api-key"
        )


def _is_local(url: str) -> bool:
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return False
    return host is not None and is_loopback(host)
