"""A sampler as text, with everything that another process needs to open the same weights."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from nat_plugin_evsys.errors import ConfigError

KEPT_SECONDS = 24 * 3600
"""How long weights that were nowhere but in memory can be opened by a handle."""


@dataclass(frozen=True)
class SamplerHandle:
    """Where a sampler's weights are, and how its base model was loaded.

    Attributes:
        session_id: the ServiceClient that it belongs to; one that lives in the process opening it is used again.
        store: directory of the checkpoints.
        base_model: as the user named it.
        model_path: of the weights, or None for the bare base model.
        options: of ``ServiceClient``.
    """

    session_id: str
    store: str
    base_model: str
    model_path: str | None
    options: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> str:
        """The handle as text."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, text: str) -> SamplerHandle:
        """The handle in ``encode``'s text.

        Raises:
            ConfigError: it is not a handle.
        """
        try:
            return cls(**json.loads(base64.urlsafe_b64decode(text)))
        except (ValueError, TypeError) as exc:
            raise ConfigError("this is no sampler handle; give what get_sampler_handle() returned") from exc
