"""The replicas of one base model: started, called, watched."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.steps import Pass
from nat_plugin_evsys.errors import EvsysError, ModelError, OperationCancelled, ReplicaError
from nat_plugin_evsys.replicas import cluster
from nat_plugin_evsys.replicas.passes import ReplicaSettings
from nat_plugin_evsys.replicas.replica import Replica, ShareResult
from nat_plugin_evsys.replicas.weights import Weights

logger = logging.getLogger(__name__)

RETRIES = 5
"""How often Ray runs a call again whose replica has died, so that a call that kills its replica ends."""

_POLL_S = 0.1
_FACTS_S = 2.0
_STRAGGLES = 0.5
"""A replica straggles if it computes fewer than this many times the tokens per second that the fastest one does."""
_FEWEST_PASSES = 5
"""Before that many passes a replica's speed is that of a first one, which also checks the fast path."""
_MEMORY = 0.7
"""Share of the older calls in a replica's measured speed."""


@dataclass(frozen=True)
class Replicas:
    """How many replicas of a base model, of what size, and where.

    Attributes:
        cpus: cores of each, and threads that it computes on.
        gpus: of each; None is one if the cluster has any. With several the model is split over as many processes.
        address: of a running cluster; None starts one on this machine.
    """

    count: int
    cpus: int = 1
    gpus: int | None = None
    address: str | None = None


@dataclass
class Member:
    """One replica as its callers see it.

    Attributes:
        actor: Ray's handle.
        facts: see ``Replica.facts``; as of the last time that it answered.
        restarts: seen so far.
        speed: tokens per second of passes, recent calls weighing more; None before the first.
        passes: computed so far, since its last restart.
        tokens: of passes and samples so far.
        in_flight: sequences being sampled.
    """

    actor: Any
    facts: dict[str, Any] = field(default_factory=dict)
    restarts: int = 0
    speed: float | None = None
    passes: int = 0
    tokens: int = 0
    in_flight: int = 0

    def seen(self, pid: int) -> None:
        """Note which process answered."""
        if self.facts.get("pid", pid) != pid:
            self.restarts += 1
            self.passes, self.speed = 0, None
            logger.warning("a replica died and was started again (process %s is now %s)", self.facts["pid"], pid)
        self.facts["pid"] = pid

    def computed(self, tokens: int, seconds: float, pid: int) -> None:
        """Note a pass."""
        self.seen(pid)
        self.tokens += tokens
        self.passes += 1
        speed = tokens / max(seconds, 1e-9)
        self.speed = speed if self.speed is None else _MEMORY * self.speed + (1 - _MEMORY) * speed


def stragglers_of(members: Sequence[Member]) -> list[int]:
    """Numbers of the replicas that compute less than half of the tokens per second that the fastest one does."""
    speeds = {number: m.speed or 0.0 for number, m in enumerate(members) if m.passes >= _FEWEST_PASSES}
    return [number for number, speed in speeds.items() if speed < _STRAGGLES * max(speeds.values())]


class ReplicaPool:
    """N replicas of one base model. Safe to use from several threads.

    Args:
        settings: of each replica.

    Raises:
        ConfigError: Ray is not installed, there is no such cluster, or it is too small.
        ModelError: the base model cannot be loaded there.
    """

    def __init__(self, settings: ReplicaSettings, replicas: Replicas) -> None:
        cluster.join(replicas.address)
        self._lock = threading.Lock()
        self._closed = False
        self._named: set[int] = set()
        self.members: list[Member] = []
        try:
            self.members = self._start(settings, replicas)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.members)

    def _start(self, settings: ReplicaSettings, replicas: Replicas) -> list[Member]:
        import ray

        gpus = cluster.gpus_each(replicas.gpus)
        cluster.check_room(replicas.count, replicas.cpus, gpus)
        actor = ray.remote(Replica).options(
            num_cpus=replicas.cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )
        settings = dataclasses.replace(settings, parts=max(1, gpus))
        members = [Member(actor.remote(settings)) for _ in range(replicas.count)]
        self.members = members
        for member in members:
            member.facts = self._answer(member.actor.facts.remote())
        identities = [member.facts.pop("identity") for member in members]
        if any(identity != identities[0] for identity in identities):
            raise ModelError(
                f"ray: {settings.base_model} is not the same model on every machine of the cluster; give the same "
                "files to all"
            )
        self.identity = identities[0]
        return members

    def compute(
        self, weights: Weights, shares: Sequence[Sequence[Example]], of: Pass, poll: Callable[[list[int]], None]
    ) -> list[ShareResult | None]:
        """Each replica's share, in the order of the replicas; None for an empty one. All or nothing.

        Args:
            poll: called several times a second with the numbers of the replicas that are done. If it raises, the work
                stops.
        """
        import ray

        calls = {
            member.actor.compute.remote(weights, list(share), of): number
            for number, (member, share) in enumerate(zip(self.members, shares, strict=True))
            if share
        }
        results: list[ShareResult | None] = [None] * len(shares)
        waiting = list(calls)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
                for call in done:
                    results[calls[call]] = self._took(calls[call], self._answer(call))
                poll([number for number, result in enumerate(results) if result is not None])
        except BaseException:
            for call in waiting:
                ray.cancel(call)
            raise
        self._name_stragglers()
        return results

    def is_healthy(self) -> bool:
        """True when every replica gives finite logits."""
        return all([self._answer(member.actor.is_healthy.remote()) for member in self.members])

    def restarts(self) -> int:
        """Deaths of replicas that were seen."""
        return sum(member.restarts for member in self.members)

    def status(self) -> list[dict[str, Any]]:
        """The state of each replica.

        Returns:
            ``replica``, ``host``, ``node``, ``pid``, ``device``, ``memory`` (peak bytes), ``state`` (``up``, or
            ``starting`` if it does not answer), ``restarts``, ``tokens``, ``tokens_per_second`` (of recent passes, None
            before the first), ``sampling`` (sequences) and ``straggles``.
        """
        import ray

        asked = [member.actor.facts.remote() for member in self.members]
        up, _ = ray.wait(asked, num_returns=len(asked), timeout=_FACTS_S)
        slow = self.stragglers()
        found = []
        for number, (member, call) in enumerate(zip(self.members, asked, strict=True)):
            if call in up:
                facts = self._answer(call)
                with self._lock:
                    member.seen(facts["pid"])
                    member.facts = {key: value for key, value in facts.items() if key != "identity"}
            found.append(
                {
                    "replica": number,
                    **member.facts,
                    "state": "up" if call in up else "starting",
                    "restarts": member.restarts,
                    "tokens": member.tokens,
                    "tokens_per_second": member.speed,
                    "sampling": member.in_flight,
                    "straggles": number in slow,
                }
            )
        return found

    def stragglers(self) -> list[int]:
        """See ``stragglers_of``."""
        with self._lock:
            return stragglers_of(self.members)

    def close(self) -> None:
        """End the replicas, and the cluster if it was started here. Idempotent."""
        import ray

        with self._lock:
            if self._closed:
                return
            self._closed = True
        for member in self.members:
            ray.kill(member.actor, no_restart=True)
        cluster.leave()

    def _took(self, number: int, share: ShareResult) -> ShareResult:
        with self._lock:
            self.members[number].computed(int(share.metrics["computed_tokens:sum"]), share.seconds, share.pid)
        return share

    def _name_stragglers(self) -> None:
        slow = self.stragglers()
        for number in set(slow) - self._named:
            member = self.members[number]
            logger.warning(
                "replica %d on %s straggles: %.0f tokens/s, the fastest one has %.0f",
                number,
                member.facts.get("host"),
                member.speed,
                max(m.speed or 0.0 for m in self.members),
            )
        self._named = set(slow)

    def _answer(self, call: Any) -> Any:
        import ray

        try:
            return ray.get(call)
        except ray.exceptions.RayError as exc:
            raise readable(exc) from exc


def readable(error: Exception) -> Exception:
    """What a call of a replica failed of: its own error, or that it died."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, EvsysError | OperationCancelled):
        return cause
    import ray

    if isinstance(error, ray.exceptions.ActorDiedError | ray.exceptions.ActorUnavailableError):
        return ReplicaError(
            f"a replica died {RETRIES + 1} times in the same call, or cannot be started again: {_last_line(error)}; "
            "`nat evsys status` shows the replicas, and Ray's logs are in /tmp/ray/session_latest/logs there"
        )
    return ReplicaError(f"a replica failed: {_last_line(cause or error)}")


def _last_line(error: Exception) -> str:
    """Where Ray quotes the error of a replica that could not start, that is the error itself."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1].strip()[:300] if text else ''}"
