"""A Tinker service as seen from here: its address and key, and a check that it works."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nat_plugin_evsys.backends.remote.errors import Purpose, readable
from nat_plugin_evsys.config.serve import is_loopback
from nat_plugin_evsys.errors import ConfigError, ServiceUnavailableError

if TYPE_CHECKING:
    from nat_plugin_evsys.config.policy import EvsysPolicyConfig

KEY_PREFIXES = ("tml-", "eyJ")
"""What the SDK takes for a key."""

PLACEHOLDER_KEY = "tml-no-key-on-loopback"
PROBE_SECONDS = 5.0
CHECK_SECONDS = 30.0
"""Seconds that a service has to answer what it can do."""


class TinkerService:
    """One service.

    Attributes:
        url: without a slash at its end.
        key: sent with each request.
        key_from: where the key comes from, for messages.
    """

    def __init__(self, url: str, key: str, key_from: str = "api_key") -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.key_from = key_from

    @classmethod
    def of(cls, config: EvsysPolicyConfig) -> TinkerService:
        """The service that ``base_url`` names, with the key from the environment.

        Raises:
            ConfigError: no key, or an invalid one.
        """
        assert config.base_url is not None
        name = config.api_key_env
        key = os.environ.get(name, "")
        if not key and _is_loopback(config.base_url):
            return cls(config.base_url, PLACEHOLDER_KEY, f"${name}, which is not set")
        if not key:
            raise ConfigError(f"base_url {config.base_url} needs a key: type `export {name}=tml-…` first")
        if not key.startswith(KEY_PREFIXES):
            raise ConfigError(f"${name} holds no Tinker key: one starts with `tml-`; type `export {name}=tml-…`")
        return cls(config.base_url, key, f"${name}")

    # -- looking ----------------------------------------------------------------------------------------------------

    def problem(self) -> str | None:
        """Why the service cannot be reached, or None when it answers anything at all. Blocks for a few seconds."""
        import httpx

        try:
            response = httpx.get(
                f"{self.url}/api/v1/healthz", timeout=PROBE_SECONDS, trust_env=not _is_loopback(self.url)
            )
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return f"HTTP {response.status_code}" if response.status_code >= 500 else None

    def check(self, base_model: str) -> int | None:
        """Check that the service answers, accepts the key and serves the model. Blocks.

        Returns:
            The longest context of ``base_model`` in tokens, or None if the service does not say.

        Raises:
            ServiceUnavailableError: it cannot be reached.
            ConfigError: it rejects the key, is not a Tinker service, or does not serve ``base_model``.
        """
        problem = self.problem()
        if problem is not None:
            raise ServiceUnavailableError(
                f"base_url {self.url} does not answer ({problem}); start `nat evsys serve` there, or correct base_url",
                category="server",
            )
        models = {model.model_name: model for model in self._capabilities().supported_models}
        found = models.get(base_model)
        if found is None:
            names = ", ".join(sorted(f"`{name}`" for name in models if name)) or "none"
            raise ConfigError(f"base_url {self.url} does not serve `{base_model}`; set base_model to one of: {names}")
        length: int | None = found.max_context_length
        return length

    def is_healthy(self) -> bool:
        """True when the service answers what it can do. Blocks."""
        from tinker import APIError

        try:
            self._capabilities()
        except (APIError, ConfigError, ServiceUnavailableError):
            return False
        return True

    def rest_client(self) -> Any:
        """The SDK's client of the calls that need no session."""
        import tinker

        if hasattr(tinker, "RestClient"):
            return tinker.RestClient(base_url=self.url, api_key=self.key)
        return tinker.ServiceClient(base_url=self.url, api_key=self.key).create_rest_client()

    def _capabilities(self) -> Any:
        import tinker

        try:
            if hasattr(tinker, "RestClient"):
                return self.rest_client().get_server_capabilities().result(timeout=CHECK_SECONDS)
            return tinker.ServiceClient(base_url=self.url, api_key=self.key).get_server_capabilities()
        except tinker.NotFoundError as error:
            raise ConfigError(f"base_url {self.url} is not a Tinker service ({error}); correct base_url") from None
        except Exception as error:  # noqa: BLE001 - every failure of the SDK becomes one of this package's
            raise self.readable(error, "get_server_capabilities", "start") from None

    def readable(self, error: BaseException, what: str, purpose: Purpose) -> BaseException:
        """The error to raise for what the SDK raised; see ``errors.readable``."""
        return readable(error, what=what, purpose=purpose, where=self.url, key_from=self.key_from)


def _is_loopback(url: str) -> bool:
    return is_loopback(urlsplit(url).hostname or "")
