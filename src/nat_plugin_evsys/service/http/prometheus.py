"""Metrics for Prometheus: requests, operations, and the engine's state at the time of the scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nat_plugin_evsys.service.work.throughput import Throughput

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


class ServiceMetrics:
    """Counters of one server, in their own registry. Methods are called from the event loop.

    Attributes:
        chat_tokens: tokens sampled for OpenAI's endpoint.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.chat_tokens = Throughput()
        self._requests = Counter(
            "evsys_http_requests", "Requests by route template.", ["route", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "evsys_http_request_seconds",
            "Until the response had been sent; retrieve_future waits on purpose.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._submitted = Counter(
            "evsys_operations_submitted", "Operations accepted into the queue.", ["kind"], registry=self.registry
        )
        self._finished = Counter(
            "evsys_operations_finished", "Operations that ended.", ["kind", "result"], registry=self.registry
        )

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request."""
        # A client may invent methods; each would be a time series of its own.
        self._requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def operation_submitted(self, kind: str) -> None:
        """Count an accepted operation."""
        self._submitted.labels(str(kind)).inc()

    def operation_finished(self, kind: str, *, failed: bool) -> None:
        """Count an operation that ended."""
        self._finished.labels(str(kind), "failed" if failed else "ok").inc()

    def watch(self, state: Callable[[], dict[str, Any]]) -> None:
        """Read ``state()`` (see ``status.server_status``) at each scrape too."""
        self.registry.register(_StateCollector(state))

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _StateCollector(Collector):
    """Gauges and counters that the engine and the store keep themselves."""

    def __init__(self, state: Callable[[], dict[str, Any]]) -> None:
        self._state = state

    def describe(self) -> Iterable[Metric]:
        """Nothing: the registry must not call ``collect`` when this is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The current metrics."""
        state = self._state()
        yield _gauge("evsys_operations_queued", "Unfinished operations.", "kind", state["queued"])
        yield _gauge("evsys_models", "Training runs of live sessions.", "state", state["model_states"])
        yield _gauge("evsys_memory_bytes", "Memory of this process and its accelerator.", "kind", state["memory"])
        yield _gauge("evsys_sampling_sequences", "Sequences in the samplers.", "state", state["sampling"])
        yield _gauge("evsys_sessions", "Sessions not yet forgotten.", None, {"": state["sessions"]})
        yield _gauge("evsys_long_polls", "Clients that wait for a result.", None, {"": state["long_polls"]})
        yield _counter("evsys_engine_seconds", "Seconds of training and sampling work.", "kind", state["seconds"])
        yield _counter("evsys_tokens", "Tokens trained on and sampled.", "kind", state["tokens"])


def _gauge(name: str, text: str, label: str | None, values: dict[str, float]) -> Metric:
    return _family(GaugeMetricFamily(name, text, labels=[label] if label else []), label, values)


def _counter(name: str, text: str, label: str | None, values: dict[str, float]) -> Metric:
    return _family(CounterMetricFamily(name, text, labels=[label] if label else []), label, values)


def _family(family: GaugeMetricFamily | CounterMetricFamily, label: str | None, values: dict[str, float]) -> Metric:
    for key, value in values.items():
        family.add_metric([key] if label else [], value)
    return family
