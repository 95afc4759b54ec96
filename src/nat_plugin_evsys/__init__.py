"""Reinforcement finetuning for any NeMo Agent Toolkit workflow. See README.md, and docs/api.md for the clients."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nat_plugin_evsys import types as types
    from nat_plugin_evsys.clients.rest import RestClient as RestClient
    from nat_plugin_evsys.clients.sampling import SamplingClient as SamplingClient
    from nat_plugin_evsys.clients.service import ServiceClient as ServiceClient
    from nat_plugin_evsys.clients.training import TrainingClient as TrainingClient
    from nat_plugin_evsys.policy.address import policy_endpoint as policy_endpoint

__version__ = "0.1.0"

_MODULES = {
    "RestClient": "nat_plugin_evsys.clients.rest",
    "SamplingClient": "nat_plugin_evsys.clients.sampling",
    "ServiceClient": "nat_plugin_evsys.clients.service",
    "TrainingClient": "nat_plugin_evsys.clients.training",
    "policy_endpoint": "nat_plugin_evsys.policy.address",
}

__all__ = [
    "RestClient",
    "SamplingClient",
    "ServiceClient",
    "TrainingClient",
    "__version__",
    "policy_endpoint",
    "types",
]


def __getattr__(name: str) -> Any:
    # Lazily: NAT imports this package to discover the plugin, and the clients import torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
