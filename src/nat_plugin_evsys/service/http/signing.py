"""Signed URLs: whoever holds one may fetch one file until it expires, without a key."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import quote

from nat_plugin_evsys.errors import Refusal

VALID_SECONDS = 3600


class UrlSigner:
    """Signs paths with a secret that lives as long as the server: a restart invalidates all URLs."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def sign(self, path: str, expires: int) -> str:
        """``path`` (percent-encoded here) with its expiry (seconds since the epoch) and signature."""
        return f"{quote(path)}?expires={expires}&signature={self._signature(path, str(expires))}"

    def check(self, path: str, expires: str, signature: str) -> None:
        """Accept a path as it was signed.

        Raises:
            Refusal: 403 forged or expired.
        """
        genuine = hmac.compare_digest(self._signature(path, expires).encode(), signature.encode())
        if not genuine or not expires.isdecimal() or int(expires[:15]) < time.time():
            raise Refusal(403, "the URL's signature is wrong or has expired; ask for new ones")

    def _signature(self, path: str, expires: str) -> str:
        message = f"{path}\n{expires}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()
