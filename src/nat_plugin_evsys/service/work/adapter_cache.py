"""The adapters that clients sample from; recently used ones stay in memory."""

from __future__ import annotations

import threading
from collections import OrderedDict

from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient

Key = tuple[str, str, int]
"""Base model, SHA-256 of the weights' file, optimizer steps: what makes two samplers' weights the same."""


class AdapterCache:
    """Sampling clients by the weights that they sample from. Safe to use from several threads.

    Args:
        memory_bytes: of all adapters; at least one is kept.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._clients: OrderedDict[Key, tuple[LocalSamplingClient, int]] = OrderedDict()

    def __len__(self) -> int:
        with self._lock:
            return len(self._clients)

    def get(self, key: Key) -> LocalSamplingClient | None:
        """The client of these weights, if they are in memory."""
        with self._lock:
            if key not in self._clients:
                return None
            self._clients.move_to_end(key)
            return self._clients[key][0]

    def put(self, key: Key, client: LocalSamplingClient, adapter: LoraAdapter) -> None:
        """Keep a client; the least recently used ones are dropped."""
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in adapter.named_tensors())
        with self._lock:
            self._clients[key] = (client, size)
            self._clients.move_to_end(key)
            while len(self._clients) > 1 and self._bytes() > self._memory_bytes:
                self._clients.popitem(last=False)

    def drop(self, key: Key) -> None:
        """Drop a client."""
        with self._lock:
            self._clients.pop(key, None)

    def bytes(self) -> int:
        """Of the adapters in memory."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(size for _, size in self._clients.values())
