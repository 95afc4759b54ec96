"""NAT sessions that choose the run id of each rollout and turn a rollout's failure into data.

If a workflow raises, NAT's EvaluationRun drops its steps and starts no others. A failed rollout is exactly
the negative sample that a group needs, so here it ends with an empty output and a recorded cause instead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from nat.builder.context import ContextState
from nat.runtime.runner import Runner, RunnerState
from nat.runtime.session import Session, SessionManager
from pydantic import BaseModel

from nat_plugin_evsys.calls import RunKind
from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.workflow.limits import exit_error
from nat_plugin_evsys.finetuning.workflow.start_gate import StartGate
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.rollouts.seeds import rollout_seed

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class Recording(NamedTuple):
    """Where the calls of a policy are recorded, and the seed that the seeds of its calls derive from."""

    recorder: Recorder
    seed: int


@dataclass(slots=True)
class Rollouts:
    """The rollouts of one evaluation run: their ids, what ended them early, and how many are done.

    Attributes:
        name: prefix of the run ids; unique per evaluation run.
        seed, recorder: see ``Recording``.
        others: of further policies, if the run trains several.
        failures: run id -> the exception that ended the rollout.
        timeouts: ids of rollouts that were cut off.
        seconds: run id -> how long the workflow ran.
        start_gate: lets the rollouts start a few at a time.
        exporters: NAT's telemetry, which every rollout is exported to.
        unattributed_before: calls of no rollout that the recorders had counted when these began.
    """

    name: str
    kind: RunKind
    seed: int
    recorder: Recorder
    exporters: RunExporters
    others: Sequence[Recording] = ()
    result_json_path: str = "$"
    timeout: float | None = None
    unattributed_before: int = 0
    on_done: Callable[[int, int], None] | None = None
    failures: dict[str, Exception] = field(default_factory=dict)
    timeouts: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    done: int = 0
    total: int = 0
    start_gate: StartGate = field(default_factory=StartGate)
    _attempts: dict[str, int] = field(default_factory=dict)
    _opened: int = 0

    @property
    def recorders(self) -> list[Recorder]:
        """The recorders of all policies under training, in their order."""
        return [self.recorder, *(other.recorder for other in self.others)]

    async def open(self, message: Any) -> str:
        """Open a recorded run for the next attempt at ``message``, with a seed of its own, when its turn has come."""
        begun = await self.start_gate.take()
        attempt = self._attempts.get(key := str(message), 0)
        self._attempts[key] = attempt + 1
        run_id = f"{self.name}/{self._opened:06d}"
        self._opened += 1
        for recorder, seed in (Recording(self.recorder, self.seed), *self.others):
            recorder.open_run(run_id, self.kind, rollout_seed(seed, self.name, key, attempt), begun)
        return run_id

    def close(self, run_id: str, error: Exception | None, seconds: float) -> None:
        """Record how a rollout ended, and how long it took."""
        self.seconds[run_id] = seconds
        if error is not None:
            self.failures[run_id] = error
        self.done += 1
        if self.on_done is not None:
            self.on_done(self.done, self.total)


class RecordedSessions:
    """A SessionManager whose sessions run recorded rollouts; everything else is the wrapped manager's."""

    def __init__(self, sessions: SessionManager, rollouts: Rollouts) -> None:
        self._sessions = sessions
        self._rollouts = rollouts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sessions, name)

    @asynccontextmanager
    async def session(self, **kwargs: Any) -> AsyncIterator[RecordedSession]:
        """A session of the wrapped manager, recorded."""
        async with self._sessions.session(**kwargs) as session:
            yield RecordedSession(session, self._rollouts)


class RecordedSession:
    """A Session whose runs are recorded rollouts."""

    def __init__(self, session: Session, rollouts: Rollouts) -> None:
        self._session = session
        self._rollouts = rollouts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    @asynccontextmanager
    async def run(self, message: Any, **kwargs: Any) -> AsyncIterator[RecordedRunner]:
        """Run the workflow once, as a recorded rollout."""
        async with self._session.run(message, **kwargs) as runner:
            yield RecordedRunner(runner, self._rollouts, await self._rollouts.open(message))


class RecordedRunner:
    """A Runner that does not raise the workflow's errors: the output is then empty and the cause recorded."""

    def __init__(self, runner: Runner, rollouts: Rollouts, run_id: str) -> None:
        self._runner = runner
        self._rollouts = rollouts
        self._run_id = run_id

    async def result(self) -> Any:
        """The workflow's output after ``result_json_path``; "" when the rollout failed."""
        token = ContextState.get().workflow_run_id.set(self._run_id)
        error: Exception | None = None
        output: Any = ""
        started = time.monotonic()
        try:
            async with self._rollouts.exporters.exporting(), asyncio.timeout(self._rollouts.timeout) as deadline:
                output = self._extract(await self._runner.result())
        except (Exception, SystemExit, asyncio.CancelledError) as caught:  # noqa: BLE001 - a failed rollout is data
            error = _error_of(caught)
            if deadline.expired():
                self._rollouts.timeouts.add(self._run_id)
            if deadline.expired() or isinstance(caught, asyncio.CancelledError):
                self._end_cancelled_run()
            logger.debug("rollout %s failed: %s", self._run_id, caught)
        finally:
            ContextState.get().workflow_run_id.reset(token)
        self._rollouts.close(self._run_id, error, time.monotonic() - started)
        return output

    def convert(self, value: Any, to_type: type) -> Any:
        """The output is final already."""
        return value

    def _extract(self, output: Any) -> Any:
        with suppress(ValueError):
            output = self._runner.convert(output, to_type=str)
        if isinstance(output, BaseModel):
            return output.model_dump_json(indent=2)
        found = _json_path(self._rollouts.result_json_path).find(output)
        if not found:
            raise ValueError(f"the workflow's output has no value at {self._rollouts.result_json_path}")
        return found[0].value

    def _end_cancelled_run(self) -> None:
        # NAT's Runner ends its event stream and sets its state for an Exception, but not when it is cancelled;
        # whoever reads the stream would wait forever.
        stream = ContextState.get().event_stream.get()
        if stream is not None:
            stream.on_complete()
        self._runner._state = RunnerState.FAILED


def _error_of(caught: BaseException) -> Exception:
    """What a rollout failed with. A cancellation of the task itself is raised again; one from within is an error."""
    if isinstance(caught, SystemExit):
        return exit_error(caught)
    if isinstance(caught, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise caught
        return RuntimeError("the workflow raised asyncio.CancelledError: it waited for something that was cancelled")
    assert isinstance(caught, Exception)
    return caught


@cache
def _json_path(expression: str) -> Any:
    """Parsed once: that takes longer than many a rollout's other bookkeeping."""
    from jsonpath_ng.parser import parse

    return parse(expression)
