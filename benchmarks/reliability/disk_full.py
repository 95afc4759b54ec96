"""A disk that is full at each write in turn, for the files of a run and for the store of a server.

    python benchmarks/reliability/disk_full.py [--small]

The calls of the C library that need space (faults.c, which needs a C compiler) fail once with ENOSPC: the first, the
second, and so on to the last, each in a process of its own. A write that fails leaves half of its bytes. After each
failure another process takes over on a disk with space. A failure passes if

- the error names the file that could not be written,
- what was committed or acknowledged before it is whole: every checkpoint that the state names, every row of the store,
- and the run, resumed, ends as an undisturbed one does, with no file left over.

``--small`` lets every tenth call fail.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {"trainers": {"t": {"seed": 0}}}
EPOCHS = 2
OPERATIONS = 6


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--small", action="store_true", help="every tenth call")
    arguments.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.place is None:
        return _again_with_faults(options.small)
    _preload()
    failures: list[str] = []
    for name, subject in (("run", RunFiles()), ("store", StoreFiles())):
        calls = Faulty(options.place / f"{name}-0", subject).calls
        found = Counter[str]()
        for number in range(1, calls + 1, 10 if options.small else 1):
            place = options.place / f"{name}-{number}"
            faulty = Faulty(place, subject, number)
            problems = faulty.problems()
            found[faulty.outcome] += 1
            failures += [f"{name}, call {number} ({faulty.failed}): {problem}" for problem in problems]
            shutil.rmtree(place)
        print(f"{name}: {calls} calls, {sum(found.values())} failed in turn: {dict(found)}", flush=True)
    print("\n".join([*failures, f"{len(failures)} problems"]))
    return 1 if failures else 0


def _preload() -> None:
    """What each forked process would otherwise import again."""
    import nat_plugin_evsys.finetuning.bookkeeping
    import nat_plugin_evsys.service.store.store
    import nat_plugin_evsys.service.wire.kinds  # noqa: F401


def _again_with_faults(small: bool) -> int:
    place = Path(tempfile.mkdtemp(prefix="evsys-full-"))
    library = place / "faults.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    environment = {"LD_PRELOAD": str(library), "FAULT_DIRECTORY": str(place / "disk"), "OMP_NUM_THREADS": "1"}
    try:
        words = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--place",
            str(place / "disk"),
            *(["--small"] if small else []),
        ]
        return subprocess.run(words, env={**os.environ, **environment}, check=False).returncode
    finally:
        shutil.rmtree(place, ignore_errors=True)


class Faulty:
    """One life of a subject in a process in which the ``number``-th call fails (none, for 0).

    Attributes:
        calls: how many calls there were until its end.
        failed: the call that failed, and the file.
        error: what the subject raised; None where it went on.
    """

    def __init__(self, place: Path, subject: Any, number: int = 0) -> None:
        place.mkdir(parents=True)
        self.place, self._subject = place, subject
        result = _in_child(lambda: self._live(number))
        self.calls, self.failed, self.error, self._told = (result[key] for key in ("calls", "failed", "error", "told"))

    @property
    def outcome(self) -> str:
        """What the subject did about the failure."""
        return "went on" if self.error is None else "said so"

    def problems(self) -> list[str]:
        """What is wrong after the failure."""
        found = [] if self.error is None or str(self.place) in self.error else [f"no path in: {self.error}"]
        return found + list(_in_child(lambda: self._subject.recover(self.place, self._told)))

    def _live(self, number: int) -> dict[str, Any]:
        library = ctypes.CDLL(None)
        library.fault_failed.restype = ctypes.c_char_p
        told: list[Any] = []
        error = None
        library.fault_arm(ctypes.c_long(number))
        try:
            self._subject.live(self.place, told)
        except Exception as caught:  # noqa: BLE001 - whatever the user would be shown
            error = f"{type(caught).__name__}: {caught}"
        calls = library.fault_calls()
        return {"calls": calls, "failed": library.fault_failed().decode(), "error": error, "told": told}


class RunFiles:
    """Everything that ``nat finetune`` writes to a run directory, in its order."""

    def __init__(self) -> None:
        from nat_plugin_evsys.engine.model.loading import load_base_model
        from nat_plugin_evsys.engine.model.lora import LoraAdapter
        from nat_plugin_evsys.runtime.bases import SharedBase

        base = load_base_model("builtin/tiny", device="cpu")
        self._model = SharedBase(base).train(LoraAdapter.create(base.model, rank=1, alpha=1, seed=0))

    def live(self, place: Path, told: list[Any]) -> None:
        """Begin a run, or resume the one that is there, and end it."""
        from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
        from nat_plugin_evsys.runs import RunDirectory

        books = RunBooks.open(place / "runs", CONFIG, resume=RunDirectory.newest(place / "runs") is not None)
        if books.is_finished:
            return
        books.rewind()
        for epoch in range(books.state.committed_epoch + 1, EPOCHS + 1):
            self._epoch(books, epoch)
            told.append(epoch)
        books.finish("nat run", {})
        told.append("finished")

    def _epoch(self, books: Any, epoch: int) -> None:
        from nat_plugin_evsys.engine.checkpoints import save_checkpoint
        from nat_plugin_evsys.runs.rollouts import Collection
        from nat_plugin_evsys.training.job_ledger import JobLedger

        directory, name = books.run_dir.path, f"epoch-{epoch:04d}"
        if epoch > 0:  # a job's epoch counts from 0, and is committed as one more epoch done
            JobLedger(directory).submitted(f"job-{epoch}", directory.name, epoch=epoch - 1)
        books.run_dir.rollouts.write(Collection("epoch", epoch), ['{"reward": 1}'] * 50)
        if epoch > 0:
            JobLedger(directory).finished(f"job-{epoch}", directory.name, status="completed")
        books.metrics.append("epoch", epoch, reward_mean=0.5)
        path = str(save_checkpoint(directory / "checkpoints", name, self._model, kind="training"))
        books.state.warm_started = True
        books.commit(epoch, name, path, path, epoch / 10, curriculum={}, keep=1)

    def recover(self, place: Path, told: list[Any]) -> list[str]:
        """Another process resumes; what is wrong with what it finds and makes."""
        from nat_plugin_evsys.engine.checkpoints import read_checkpoint
        from nat_plugin_evsys.runs import RunDirectory

        found = []
        run = RunDirectory.newest(place / "runs")
        committed = [entry for entry in told if entry != "finished"]
        if run is not None:
            if run.state.committed_epoch < max(committed, default=-1):
                found.append(f"epoch {max(committed)} was committed, and is {run.state.committed_epoch}")
            for record in run.state.checkpoints:
                read_checkpoint(run.locate(record.adapter))
        self.live(place, [])
        run = RunDirectory.newest(place / "runs")
        assert run is not None
        for file, wanted in (("metrics.jsonl", range(EPOCHS + 1)), ("jobs.jsonl", range(EPOCHS))):
            epochs = Counter(
                record["epoch"]
                for record in map(json.loads, (run.path / file).read_text().splitlines())
                if record.get("event") != "finished"
            )
            if epochs != Counter(wanted):
                found.append(f"{file} has epochs {dict(epochs)}")
        found += [f"left over: {path.name}" for path in run.path.rglob(".*") if path.name != ".lock"]
        named = {record.name for record in run.state.checkpoints}
        there = {path.name for path in run.checkpoints_dir.iterdir()}
        return found if named == there else [*found, f"checkpoints {there}, named {named}"]


class StoreFiles:
    """The database of ``nat evsys serve``: a session, a model, and operations that end."""

    def live(self, place: Path, told: list[Any]) -> None:
        """Write; ``told`` are the requests that were acknowledged. The first error is raised at the end."""
        from nat_plugin_evsys.errors import StoreError
        from nat_plugin_evsys.service.store.rows import ModelRow, SessionRow
        from nat_plugin_evsys.service.store.store import Store

        store, errors = Store(place / "store"), []

        def do(name: str, write: Callable[[], Any]) -> None:
            try:
                write().result(30)
                told.append(name)
            except StoreError as error:
                errors.append(error)

        try:
            do("session", lambda: store.add_session(SessionRow("s", "alice")))
            do("model", lambda: store.add_model(ModelRow("m", "s", "alice", 0, "builtin/tiny", 4)))
            for number in range(OPERATIONS):
                do(f"operation r{number}", lambda number=number: store.add_operation(_operation(number)))
                do(f"result r{number}", lambda number=number: store.finish_operation(f"r{number}", _outcome()))
        finally:
            store.close()
        # A write that refers to one that failed fails as well: the first error is that of the full disk.
        if errors:
            raise errors[0]

    def recover(self, place: Path, told: list[Any]) -> list[str]:
        """A server starts again on the store; what was acknowledged and is not there."""
        from nat_plugin_evsys.service.store.store import Store

        store, found = Store(place / "store"), []
        try:
            for entry in told:
                kind, _, request = entry.partition(" ")
                if kind == "session" and store.session("s") is None:
                    found.append("the session is lost")
                if kind == "model" and store.model("m") is None:
                    found.append("the model is lost")
                known = store.outcome(request) if request else None
                if request and known is None:
                    found.append(f"{entry} is lost")
                if kind == "result" and known is not None and known.outcome is None:
                    found.append(f"{entry} is lost")
            if told and len(told) < 2:
                store.touch_session("s", 1.0).result(30)
        finally:
            store.close()
        return found


def _operation(number: int) -> Any:
    from nat_plugin_evsys.service.store.operations import Operation
    from nat_plugin_evsys.service.wire.kinds import OperationKind

    return Operation(f"r{number}", "alice", OperationKind.SAMPLE, "s:sample:0", number, os.urandom(20_000))


def _outcome() -> Any:
    from nat_plugin_evsys.service.store.operations import JSON, Effect, Outcome

    return Outcome(os.urandom(20_000), JSON, effect=Effect.APPLIED)


def _in_child(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a forked process, as JSON."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - told to the parent
            result = [f"{type(error).__name__}: {error}"]
        with os.fdopen(writing, "w") as pipe:
            json.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


if __name__ == "__main__":
    sys.exit(main())
