"""The recorder: which calls each workflow run made. Training data comes from here and from nowhere else."""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from nat_plugin_evsys.calls import Call, DropReason, RunKind

MAX_REFUSAL_KINDS = 64
"""Kinds of refusals that are told apart; messages may quote what a client sent, which has no end."""

_KIND_CHARACTERS = 200
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class CallFailure:
    """A call that the infrastructure, not the policy, failed to answer."""

    run_id: str | None
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


@dataclass(frozen=True, slots=True)
class CallRefusal:
    """A call that was not answered because the request was wrong, and the drop reason it is counted under."""

    reason: DropReason
    message: str

    @property
    def kind(self) -> str:
        """The message without its numbers: refusals that differ in nothing else are of one kind."""
        return _NUMBER.sub("#", self.message)[:_KIND_CHARACTERS]


@dataclass(frozen=True, slots=True)
class RecorderTotals:
    """Counts since the recorder was made.

    Attributes:
        calls: calls recorded in a run that was open.
        unattributed: calls of no run, or of a run that was not open, while some run was open.
        failures: calls that the infrastructure failed to answer (in any run, or in none).
        disconnected: calls whose client went away before the answer began; their sampling was cancelled.
        refused: calls that were refused, by reason.
        answered: calls that were answered, in any run or in none.
        refusals: the same by the message of the first of each kind; what exceeds ``MAX_REFUSAL_KINDS`` is left out.
    """

    calls: int
    unattributed: int
    failures: int
    disconnected: int
    refused: Mapping[DropReason, int] = field(default_factory=dict)
    answered: int = 0
    refusals: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    kind: RunKind
    seed: int | None
    calls: list[Call] = field(default_factory=list)
    failures: list[CallFailure] = field(default_factory=list)
    refusals: list[CallRefusal] = field(default_factory=list)
    seeds_given: int = 0
    in_flight: int = 0
    on_first_call: Callable[[], None] | None = None


class Recorder:
    """Keeps the calls of open runs until each is closed. Calls outside open runs are counted, never kept.

    Any thread may call any method.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._runs: dict[str, _Run] = {}
        self._when_closed: list[Callable[[str], None]] = []
        self._sequence = 0
        self._calls = 0
        self._unattributed = 0
        self._failures = 0
        self._disconnected = 0
        self._refused: Counter[DropReason] = Counter()
        self._refusals: dict[str, tuple[str, int]] = {}  # kind -> the first message, the number of calls

    def open_run(
        self, run_id: str, kind: RunKind, seed: int | None, on_first_call: Callable[[], None] | None = None
    ) -> None:
        """Begin to keep the calls that carry ``run_id``.

        Args:
            seed: calls that state no seed get one derived from it (``next_seed``); None leaves them unseeded.
            on_first_call: called once, in any thread, when the run's first call is about to be sampled.

        Raises:
            ValueError: the run is open already.
        """
        with self._lock:
            if run_id in self._runs:
                raise ValueError(f"run `{run_id}` is already open; close it first or use another run id")
            self._runs[run_id] = _Run(kind, seed, on_first_call=on_first_call)

    def receive(self, run_id: str | None) -> Callable[[], None]:
        """Note that a request has come in; what is returned notes that it is answered, and its calls recorded."""
        with self._lock:
            run = self._runs.get(run_id) if run_id is not None else None
            if run is not None:
                run.in_flight += 1

        def end() -> None:
            if run is not None:
                with self._ended:
                    run.in_flight -= 1
                    self._ended.notify_all()

        return end

    def wait_until_answered(self, run_ids: Collection[str], seconds: float) -> bool:
        """Wait until no request of these runs is in flight; False if some still are when the time is up.

        A workflow that stops reading a stream ends before the endpoint has noticed.
        """
        with self._ended:
            runs = [self._runs[run_id] for run_id in run_ids if run_id in self._runs]
            return self._ended.wait_for(lambda: not any(run.in_flight for run in runs), seconds)

    def begin_call(self, run_id: str | None) -> None:
        """Note that a call is about to be sampled."""
        with self._lock:
            run = self._runs.get(run_id) if run_id is not None else None
            if run is None or run.on_first_call is None:
                return
            notify, run.on_first_call = run.on_first_call, None
        notify()

    def close_run(self, run_id: str) -> list[Call]:
        """Stop keeping the run's calls and hand them over in arrival order.

        Raises:
            ValueError: the run is not open.
        """
        with self._lock:
            calls = self._open(run_id, self._runs.pop(run_id, None)).calls
        for tell in self._when_closed:
            tell(run_id)
        return calls

    def when_closed(self, tell: Callable[[str], None]) -> None:
        """Call ``tell`` with the id of each run that is closed from now on, in the thread that closes it."""
        self._when_closed.append(tell)

    def record(self, call: Call) -> Call:
        """Keep a call if its run is open, and give it its place in the order of arrival.

        Returns:
            The call as it was kept (or would have been).
        """
        with self._lock:
            call = replace(call, sequence=self._sequence)
            self._sequence += 1
            run = self._runs.get(call.run_id) if call.run_id is not None else None
            if run is not None:
                run.calls.append(call)
                self._calls += 1
            elif self._runs:
                self._unattributed += 1
            return call

    def fail(self, run_id: str | None, reason: str, message: str) -> None:
        """Note that the infrastructure failed a call: not what the policy did, so nothing to learn from."""
        with self._lock:
            self._failures += 1
            run = self._runs.get(run_id) if run_id is not None else None
            if run is not None:
                run.failures.append(CallFailure(run_id, reason, message))

    def answered_retry(self, run_id: str | None, retries: int) -> None:
        """Note that a call was answered at its client's ``retries``-th retry: what failed before has cost nothing."""
        with self._lock:
            run = self._runs.get(run_id) if run_id is not None else None
            if run is not None and retries > 0:
                del run.failures[-retries:]

    def refuse(self, run_id: str | None, refusal: CallRefusal) -> bool:
        """Count a call that was refused; True if it is the first of its kind."""
        with self._lock:
            self._refused[refusal.reason] += 1
            first, number = self._refusals.get(refusal.kind, (refusal.message, 0))
            is_new = number == 0 and len(self._refusals) < MAX_REFUSAL_KINDS
            if number or is_new:
                self._refusals[refusal.kind] = first, number + 1
            run = self._runs.get(run_id) if run_id is not None else None
            if run is not None:
                run.refusals.append(refusal)
            return is_new

    def disconnect(self) -> None:
        """Count a call whose client went away before any of it was sent (its own timeout, or it was cancelled)."""
        with self._lock:
            self._disconnected += 1

    def failures(self, run_id: str) -> list[CallFailure]:
        """The failed calls of an open run that no retry has made good, in arrival order.

        Raises:
            ValueError: the run is not open.
        """
        with self._lock:
            return list(self._open(run_id, self._runs.get(run_id)).failures)

    def refusals(self, run_id: str) -> list[CallRefusal]:
        """The refused calls of an open run, in arrival order.

        Raises:
            ValueError: the run is not open.
        """
        with self._lock:
            return list(self._open(run_id, self._runs.get(run_id)).refusals)

    def kind_of(self, run_id: str | None) -> RunKind | None:
        """The kind of an open run; None for any other."""
        with self._lock:
            run = self._runs.get(run_id) if run_id is not None else None
            return None if run is None else run.kind

    def next_seed(self, run_id: str | None) -> int | None:
        """A seed for the run's next call, or None when the run is not open or has no seed.

        It depends on the run's seed and the number of seeds given in this run only, so what other runs do beside it
        changes nothing. 31 bits, as not every service takes more.
        """
        with self._lock:
            run = self._runs.get(run_id) if run_id is not None else None
            if run is None or run.seed is None:
                return None
            key = f"{run.seed}/{run.seeds_given}".encode()
            run.seeds_given += 1
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1

    @property
    def totals(self) -> RecorderTotals:
        """What has been counted so far."""
        with self._lock:
            return RecorderTotals(
                self._calls,
                self._unattributed,
                self._failures,
                self._disconnected,
                dict(self._refused),
                self._sequence,
                dict(self._refusals.values()),
            )

    def _open(self, run_id: str, run: _Run | None) -> _Run:
        if run is None:
            raise ValueError(f"run `{run_id}` is not open")
        return run
