"""Writes are committed together, fail alone, and outlive the process."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from nat_plugin_evsys.errors import ConfigError, StoreError
from nat_plugin_evsys.service.store.operations import JSON, Effect, Operation, Outcome
from nat_plugin_evsys.service.store.store import SessionRow, Store
from nat_plugin_evsys.service.wire.kinds import OperationKind

OK = Outcome(b"{}", JSON, effect=Effect.APPLIED)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store", max_queued_per_owner=500)
    store.add_session(SessionRow("s", "alice")).result(5)
    yield store
    store.close()


class Held:
    """While the block runs, the writer's thread is busy, so that all writes wait for one group."""

    def __init__(self, store: Store) -> None:
        self.store, self.go, self.started = store, threading.Event(), threading.Event()

    def __enter__(self) -> None:
        def hold(_connection: Any) -> None:
            self.started.set()
            assert self.go.wait(10)

        self.store._write(hold)
        assert self.started.wait(10)

    def __exit__(self, *_: object) -> None:
        self.go.set()


def sample(number: int, payload: bytes = b"x") -> Operation:
    return Operation(f"r{number}", "alice", OperationKind.SAMPLE, "s:sample:0", number, payload)


def test_what_waits_is_one_commit(store: Store) -> None:
    commits = []
    event.listen(store._engine, "commit", lambda _connection: commits.append(1))
    with Held(store):
        futures = [store.add_operation(sample(n)) for n in range(100)]
        assert not any(future.done() for future in futures)
    assert [future.result(5) for future in futures] == [(f"r{n}", True) for n in range(100)]
    assert len(commits) == 2  # the one that held the others up, and theirs


def test_one_s_failure_is_its_own(store: Store) -> None:
    def half_done(connection: Any) -> None:
        connection.execute(text("DELETE FROM operations"))
        raise KeyError("half done")

    with Held(store):
        before = store.add_operation(sample(1))
        doubled = store.add_session(SessionRow("s", "alice"))
        failing = store._write(half_done)
        after = store.add_operation(sample(2))
    assert before.result(5)[1]
    assert after.result(5)[1]
    assert isinstance(doubled.exception(5), StoreError)
    assert isinstance(failing.exception(5), StoreError)
    assert [op.request_id for op in store.unfinished()] == ["r1", "r2"]


def test_a_group_that_cannot_be_committed_is_reported_to_all(store: Store) -> None:
    def broken_at_commit(connection: Any) -> None:
        connection.execute(text("PRAGMA defer_foreign_keys=ON"))
        connection.execute(text("INSERT INTO payloads VALUES (999999, x'00')"))

    with Held(store):
        good, bad = store.add_operation(sample(1)), store._write(broken_at_commit)
    for future in (good, bad):
        with pytest.raises(StoreError, match="FOREIGN KEY"):
            future.result(5)
    assert store.unfinished() == []
    assert store.add_operation(sample(1)).result(5) == ("r1", True)
    assert store._queue.waiting == {"alice": 1}  # what was rolled back is not counted
    assert store.outcome("r1") is not None


def test_a_locked_database_is_an_error_and_passes(store: Store) -> None:
    store._write(lambda connection: connection.execute(text("PRAGMA busy_timeout=1"))).result(5)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked"):
        store.add_operation(sample(1)).result(5)
    other.execute("ROLLBACK")
    other.close()
    assert store.add_operation(sample(1)).result(5) == ("r1", True)


def test_a_full_disk_is_an_error_and_passes(store: Store) -> None:
    def bound(pages: int) -> None:
        store._write(lambda connection: connection.execute(text(f"PRAGMA max_page_count={pages}")).scalar()).result(5)

    bound(200)
    with Held(store):
        futures = [store.add_operation(sample(n, bytes(50_000))) for n in range(40)]
    errors = [future.exception(5) for future in futures]
    assert any(errors)
    assert all(error is None or ("full" in str(error) and isinstance(error, StoreError)) for error in errors)
    bound(2**30)
    kept = {f"r{n}" for n, error in enumerate(errors) if error is None}
    assert {op.request_id for op in store.unfinished()} == kept
    for n in range(40):
        assert store.add_operation(sample(n)).result(5) == (f"r{n}", f"r{n}" not in kept)
    assert store._queue.waiting == {"alice": 40}


async def test_a_cancelled_caller_does_not_stop_the_write(store: Store) -> None:
    with Held(store):
        future = store.add_operation(sample(1))
        waiting = asyncio.wrap_future(future)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not future.cancel()
    try:
        assert future.result(5) == ("r1", True)
    except CancelledError:
        pytest.fail("the write was taken back")
    assert store.outcome("r1") is not None


def test_callers_on_many_threads_see_their_own_writes(store: Store) -> None:
    def work(caller: int) -> None:
        for n in range(20):
            operation = sample(caller * 1000 + n, os.urandom(50))
            assert store.add_operation(operation).result(10) == (operation.request_id, True)
            assert operation in store.unfinished()
            store.finish_operation(operation.request_id, Outcome(operation.payload, JSON)).result(10)
            stored = store.outcome(operation.request_id)
            assert stored is not None
            assert stored.outcome == Outcome(operation.payload, JSON)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, caller) for caller in range(8)]:
            done.result(30)
    assert store.unfinished() == []


def test_closing_commits_what_was_handed_in(tmp_path: Path) -> None:
    store = Store(tmp_path)
    futures = [store.add_operation(sample(n)) for n in range(50)]
    store.close()
    store.close()
    assert all(future.result(0)[1] for future in futures)
    with pytest.raises(StoreError, match="closed"):
        store.add_operation(sample(99)).result(5)
    store = Store(tmp_path)
    assert len(store.unfinished()) == 50
    store.close()


WRITER = """
    import hashlib, os, sys, threading
    from pathlib import Path
    from nat_plugin_evsys.service.store.operations import *
    from nat_plugin_evsys.service.store.store import *

    store = Store(Path(sys.argv[1]))
    store.add_session(SessionRow("s", "alice")).result()

    def work(caller):
        model = f"s:train:{caller}"
        store.add_model(ModelRow(model, "s", "alice", caller, "tiny", 8)).result()
        for seq in range(1, 10**6):
            payload = os.urandom(20_000)
            request = f"{caller}-{seq}"
            digest = hashlib.sha256(payload).hexdigest()
            store.add_operation(Operation(request, "alice", OperationKind.OPTIM_STEP, model, seq, payload)).result()
            os.write(1, f"added {request} {digest}\\n".encode())
            done = Outcome(digest.encode(), JSON, effect=Effect.APPLIED)
            store.finish_operation(request, done, next_seq=seq + 1).result()
            os.write(1, f"ended {request} {digest}\\n".encode())

    for caller in range(4):
        threading.Thread(target=work, args=(caller,)).start()
"""


@pytest.mark.parametrize("lines", [150, 401])
def test_a_killed_process_loses_nothing_it_committed(tmp_path: Path, lines: int) -> None:
    said = []
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while len(said) < lines:
            line = process.stdout.readline()
            assert line, "the writer ended by itself"
            said.append(line)
        with pytest.raises(ConfigError, match="in use by another server"):
            Store(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        said += process.stdout.readlines()  # said before it died
        assert process.wait(10) == -signal.SIGKILL

    store = Store(tmp_path)
    try:
        check_all_kept(store, [line.split() for line in said if line.endswith("\n")])
    finally:
        store.close()


def check_all_kept(store: Store, said: list[list[str]]) -> None:
    assert store._rows(text("PRAGMA integrity_check"))[0][0] == "ok"
    kept = {op.request_id: op for op in store.unfinished()}
    for caller in range(4):
        replayed = [op for op, _ in store.to_replay(f"s:train:{caller}", 0)]
        model = store.model(f"s:train:{caller}")
        assert model is not None
        # an end is there with all that belongs to it, or not at all
        assert [op.seq_id for op in replayed] == list(range(1, max(1, model.next_seq)))
        kept |= {op.request_id: op for op in replayed}
    assert said
    for what, request, digest in said:
        assert hashlib.sha256(kept[request].payload).hexdigest() == digest
        if what == "ended":
            stored = store.outcome(request)
            assert stored is not None
            assert stored.outcome == Outcome(digest.encode(), JSON, effect=Effect.APPLIED)


def test_one_directory_is_opened_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="in use by another server"):
        Store(tmp_path)
    code = (
        "import pathlib, sys; from nat_plugin_evsys.service.store.store import Store; Store(pathlib.Path(sys.argv[1]))"
    )
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert other.returncode == 1
    assert "ConfigError" in other.stderr
    assert "in use by another server" in other.stderr
    store.close()
    Store(tmp_path).close()


def test_a_newer_schema_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    Store(tmp_path).close()
    database = tmp_path / "service.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    for _ in range(2):  # the refusal holds no lock
        with pytest.raises(ConfigError, match=r"schema version 99.*upgrade"):
            Store(tmp_path)
    connection = sqlite3.connect(database)
    assert connection.execute("PRAGMA user_version").fetchone() == (99,)
    connection.close()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "service.sqlite").write_bytes(b"not a database, but long enough to look" * 100)
    (tmp_path / "foreign").mkdir()
    connection = sqlite3.connect(tmp_path / "foreign" / "service.sqlite")
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    (tmp_path / "file").write_text("")
    for name, says in (("garbage", "not a database"), ("foreign", "no schema version"), ("file", "cannot be used")):
        with pytest.raises(ConfigError, match=says):
            Store(tmp_path / name)
