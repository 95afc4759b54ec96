"""The replicas of one base model: started, called, watched, and more or fewer of them when asked."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nat_plugin_evsys.engine.gradient.datums import Example
from nat_plugin_evsys.engine.gradient.steps import Pass
from nat_plugin_evsys.errors import EngineClosedError, ModelError, ReplicaError
from nat_plugin_evsys.replicas import cluster
from nat_plugin_evsys.replicas.answers import RETRIES, answer
from nat_plugin_evsys.replicas.cluster import Replicas
from nat_plugin_evsys.replicas.members import Member, stragglers_of
from nat_plugin_evsys.replicas.passes import ReplicaSettings
from nat_plugin_evsys.replicas.replica import Replica, ShareResult
from nat_plugin_evsys.replicas.weights import Weights

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_FACTS_S = 2.0


class ReplicaPool:
    """N replicas of one base model. Safe to use from several threads.

    Args:
        settings: of each replica.

    Attributes:
        members: those that get work.
        identity: of the base model.

    Raises:
        ConfigError: Ray is not installed, there is no such cluster, or it is too small.
        ModelError: the base model cannot be loaded there.
    """

    def __init__(self, settings: ReplicaSettings, replicas: Replicas) -> None:
        cluster.join(replicas.address)
        self._settings = settings
        self._replicas = replicas
        self._lock = threading.Lock()
        self._scaling = threading.Lock()
        self._closed = False
        self._named: set[Member] = set()
        self._ended_restarts = 0
        self._alive: list[Member] = []  # also those that are starting or leaving
        self.members: tuple[Member, ...] = ()
        self.identity: dict[str, Any] = {}
        try:
            self.scale(replicas.count)
        except BaseException:
            self.close()
            raise

    def scale(self, count: int) -> None:
        """Have ``count`` replicas: start more, which get work once they have loaded the model, or take the last ones
        out and end them once nobody waits for their answers. A pass goes on with the replicas that it began with.

        Raises:
            ConfigError: the cluster is too small for more.
            ModelError: the base model cannot be loaded there.
            EngineClosedError: the pool has been closed.
        """
        with self._scaling:
            more = count - len(self.members)
            if more > 0:
                self._add(more)
            elif more < 0:
                self._remove(-more)

    def _add(self, count: int) -> None:
        import ray

        cpus, gpus = self._replicas.cpus, cluster.gpus_each(self._replicas.gpus)
        what = f"{count} more replicas" if self.members else f"replicas: {count}"
        cluster.check_room(what, count, cpus, gpus)
        actor = ray.remote(Replica).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=RETRIES,
            scheduling_strategy="SPREAD",
        )
        settings = dataclasses.replace(self._settings, parts=max(1, gpus))
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine has been closed; create a new one")
            new = [Member(actor.remote(settings)) for _ in range(count)]
            self._alive += new
        try:
            for member in new:
                member.facts = answer(member.actor.facts.remote())
            self._check_same_model(new)
        except BaseException:
            self._end(new)
            raise
        with self._lock:
            self.members = (*self.members, *new)

    def _check_same_model(self, new: Sequence[Member]) -> None:
        for member in new:
            identity = member.facts.pop("identity")
            self.identity = self.identity or identity
            if identity != self.identity:
                raise ModelError(
                    f"ray: {self._settings.base_model} is not the same model on every machine of the cluster; give the "
                    "same files to all"
                )

    def _remove(self, count: int) -> None:
        with self._lock:
            self.members, leaving = self.members[:-count], self.members[-count:]
            for member in leaving:
                member.leaving = True
        while any(member.busy for member in leaving) and not self._closed:
            time.sleep(_POLL_S)
        self._end(leaving)

    def _end(self, members: Sequence[Member]) -> None:
        import ray

        with self._lock:
            if self._closed:
                return  # ``close`` ends all
            self._alive = [member for member in self._alive if member not in members]
            self._ended_restarts += sum(member.restarts for member in members)
        for member in members:
            ray.kill(member.actor, no_restart=True)

    @property
    def dtype(self) -> str:
        """What the replicas compute in, as ``load_base_model`` takes it."""
        dtype: str = self.members[0].facts["dtype"]
        return dtype

    @contextmanager
    def passing(self) -> Iterator[tuple[Member, ...]]:
        """The replicas of a pass. None of them is ended before the pass is over."""
        with self._lock:
            members = self.members
            for member in members:
                member.passing += 1
        try:
            yield members
        finally:
            with self._lock:
                for member in members:
                    member.passing -= 1

    @contextmanager
    def sampling(self, sequences: int, choose: Callable[[Sequence[Member]], int]) -> Iterator[Member]:
        """The replica of a sampling request, which is not ended before the request is over.

        Args:
            choose: gives the number of one of the replicas.
        """
        with self._lock:
            member = self.members[choose(self.members)]
            member.in_flight += sequences
        try:
            yield member
        finally:
            with self._lock:
                member.in_flight -= sequences

    def compute(
        self,
        members: Sequence[Member],
        weights: Weights,
        shares: Sequence[Sequence[Example]],
        of: Pass,
        poll: Callable[[list[int]], None],
    ) -> list[ShareResult | None]:
        """Each replica's share, in the order of the replicas; None for an empty one. All or nothing.

        Args:
            members: as ``passing`` gave them.
            poll: called several times a second with the numbers of the replicas that are done. If it raises, the work
                stops.
        """
        import ray

        calls = {
            member.actor.compute.remote(weights, list(share), of): number
            for number, (member, share) in enumerate(zip(members, shares, strict=True))
            if share
        }
        results: list[ShareResult | None] = [None] * len(shares)
        waiting = list(calls)
        try:
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
                for call in done:
                    results[calls[call]] = self._took(members[calls[call]], answer(call))
                poll([number for number, result in enumerate(results) if result is not None])
        except BaseException:
            for call in waiting:
                ray.cancel(call)
            raise
        self._name_stragglers()
        return results

    def is_healthy(self) -> bool:
        """True when every replica gives finite logits."""
        with self.passing() as members:
            return all([answer(member.actor.is_healthy.remote()) for member in members])

    def restarts(self) -> int:
        """Deaths of replicas that were seen."""
        with self._lock:
            return self._ended_restarts + sum(member.restarts for member in self._alive)

    def status(self) -> list[dict[str, Any]]:
        """The state of each replica.

        Returns:
            ``replica``, ``host``, ``node``, ``pid``, ``device``, ``dtype``, ``memory`` (peak bytes), ``state``
            (``up``; ``starting`` if it does not answer, or gets no work yet; ``leaving``), ``restarts``, ``tokens``,
            ``tokens_per_second`` (of recent passes, None before the first), ``sampling`` (sequences) and
            ``straggles``. What a replica says of itself is None before its first answer.
        """
        import ray

        with self._lock:
            alive = list(self._alive)
        asked = [member.actor.facts.remote() for member in alive]
        up, _ = ray.wait(asked, num_returns=len(asked), timeout=_FACTS_S)
        answered = {member: call for member, call in zip(alive, asked, strict=True) if call in up}
        for member, call in answered.items():
            self._note(member, call)
        with self._lock:
            slow = stragglers_of(self.members)
            ready = answered.keys() & set(self.members)
            return [
                {
                    "replica": number,
                    **member.row(),
                    "state": "leaving" if member.leaving else "up" if member in ready else "starting",
                    "straggles": number in slow,
                }
                for number, member in enumerate(self._alive)
            ]

    def _note(self, member: Member, call: Any) -> None:
        try:
            facts = answer(call)
        except ReplicaError:
            if member in self._alive:
                raise
            return  # it was leaving, and has left
        del facts["identity"]
        with self._lock:
            member.seen(facts["pid"])
            member.facts.update(facts)

    def close(self) -> None:
        """End the replicas, and the cluster if it was started here. Idempotent."""
        import ray

        with self._lock:
            if self._closed:
                return
            self._closed = True
        for member in self._alive:
            ray.kill(member.actor, no_restart=True)
        with self._scaling:  # who waits for a replica that was killed is told so by Ray
            cluster.leave()

    def _took(self, member: Member, share: ShareResult) -> ShareResult:
        with self._lock:
            member.computed(int(share.metrics["computed_tokens:sum"]), share.seconds, share.pid)
        return share

    def _name_stragglers(self) -> None:
        with self._lock:
            members = self.members
            slow = {members[number]: number for number in stragglers_of(members)}
        for member in slow.keys() - self._named:
            logger.warning(
                "replica %d on %s straggles: %.0f tokens/s, the fastest one has %.0f",
                slow[member],
                member.facts.get("host"),
                member.speed,
                max(m.speed or 0.0 for m in members),
            )
        self._named = set(slow)
