"""Who sends a request: API keys and their identities."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.web.origin import refuse_foreign_hosts, refuse_web_pages

LOCAL = "local"
"""The owner of everything where no keys are configured."""


def owner_of(key: str) -> str:
    """The identity of a key: the first 16 hex digits of its SHA-256."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


class Keys:
    """The configured API keys. Keeps only their digests and never logs them.

    Args:
        keys: without any, everybody on this machine is let in as ``local``, and may do what an operator may.
        operator: one more key, whose owner may change the server.
    """

    def __init__(self, keys: Sequence[str], operator: str | None = None) -> None:
        every = [*keys, *filter(None, [operator])]
        self._digests = [hashlib.sha256(key.encode()).digest() for key in every]
        self._operator = LOCAL if not every else operator and owner_of(operator)

    @property
    def required(self) -> bool:
        """True when requests need a key."""
        return bool(self._digests)

    def owner(self, headers: Mapping[str, str]) -> str:
        """The owner that a request's ``X-API-Key`` or ``Authorization: Bearer`` identifies.

        Raises:
            Refusal: 401 without a known key; 403 for a request that a web page sends through a local browser.
        """
        if not self._digests:
            refuse_foreign_hosts(headers)
            refuse_web_pages(headers)
            return LOCAL
        given = _given_key(headers)
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        known = False
        for each in self._digests:  # all of them: how long it takes says nothing about which matched
            known |= hmac.compare_digest(digest, each)
        if not known:
            raise Refusal(
                401,
                "missing or wrong API key; send one that the server was started with as X-API-Key or "
                "Authorization: Bearer (TINKER_API_KEY for the SDK)",
                headers={"www-authenticate": "Bearer"},
            )
        return owner_of(given)

    def check_operator(self, owner: str) -> None:
        """Raise Refusal, 403, unless this owner may change the server."""
        if owner != self._operator:
            raise Refusal(
                403, "only the operator may do this; send the key that EVSYS_OPERATOR_KEY was when the server started"
            )


def _given_key(headers: Mapping[str, str]) -> str:
    if key := headers.get("x-api-key"):
        return key.strip()
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""
