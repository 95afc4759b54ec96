"""What became of rollouts that vLLM was to sample."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from nat_plugin_evsys.backends.vllm.drift import Drift, Probes


class RolloutFigures:
    """Counts requests and keeps the largest drift, until they are taken. Safe to use from several threads.

    Args:
        probes: shown the prompts that vLLM sampled from.
    """

    def __init__(self, probes: Probes) -> None:
        self.probes = probes
        self._lock = threading.Lock()
        self._by_vllm = 0
        self._embedded: Counter[str] = Counter()
        self._drifts: list[Drift] = []
        self._refused = 0

    def sampled(self, prompt: Sequence[int]) -> None:
        """vLLM has answered a request."""
        with self._lock:
            self._by_vllm += 1
            self.probes.see(prompt)

    def embedded(self, reason: str) -> bool:
        """The embedded engine answers a request, for this reason. True at the first one since figures were taken."""
        with self._lock:
            self._embedded[reason] += 1
            return self._embedded[reason] == 1

    def measured(self, drift: Drift, *, used: bool) -> None:
        """The drift of a new policy version, and whether vLLM samples it."""
        with self._lock:
            self._drifts.append(drift)
            self._refused += not used

    def take(self) -> dict[str, float]:
        """Figures since they were last taken, by Tinker's way of naming.

        ``rollout_kl:max`` and ``rollout_logprob_gap:max`` of the policy versions measured, ``rollout_versions_refused:
        sum`` (too much drift), ``vllm_requests:sum`` and ``embedded_requests:sum``, those with a reason.
        """
        with self._lock:
            counts = {
                "vllm_requests:sum": float(self._by_vllm),
                "embedded_requests:sum": float(self._embedded.total()),
                "rollout_versions_refused:sum": float(self._refused),
            }
            if self._drifts:
                counts["rollout_kl:max"] = max(drift.kl for drift in self._drifts)
                counts["rollout_logprob_gap:max"] = max(drift.largest for drift in self._drifts)
            self._by_vllm, self._refused, self._drifts = 0, 0, []
            self._embedded.clear()
            return counts
