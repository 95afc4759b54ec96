"""Operations and how they ended."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

from nat_plugin_evsys.errors import QueueFullError, StoreError
from nat_plugin_evsys.service.store.operations import JSON, PROTOBUF, Effect, Operation, Outcome
from nat_plugin_evsys.service.store.store import ModelRow, SessionRow, Store
from nat_plugin_evsys.service.wire.kinds import OperationKind

MODEL = "s:train:0"
OK = Outcome(b"{}", JSON, effect=Effect.APPLIED)
HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "store", max_queued_per_owner=4, max_queued=6)
    store.add_session(SessionRow("s", "alice")).result(5)
    store.add_model(ModelRow(MODEL, "s", "alice", 0, "tiny", 8)).result(5)
    yield store
    store.close()


def step(
    request_id: str,
    seq_id: int,
    kind: OperationKind = OperationKind.FORWARD_BACKWARD,
    *,
    scope: str = MODEL,
    owner: str = "alice",
) -> Operation:
    return Operation(request_id, owner, kind, scope, seq_id, request_id.encode() * 3, created_at=1.5)


def run(store: Store, operation: Operation, outcome: Outcome = OK) -> None:
    store.add_operation(operation)
    store.finish_operation(operation.request_id, outcome, next_seq=operation.seq_id + 1).result(5)


def test_an_operation_is_kept_until_it_ends(store: Store) -> None:
    operation = step("r1", 1)
    assert store.add_operation(operation).result(5) == ("r1", True)
    assert store.unfinished() == [operation]
    waiting = store.outcome("r1")
    assert waiting is not None
    assert (waiting.owner, waiting.kind, waiting.scope, waiting.seq_id) == ("alice", operation.kind, MODEL, 1)
    assert (waiting.created_at, waiting.outcome, waiting.delivered_at) == (1.5, None, None)
    assert store.counts()["queued"] == {"forward_backward": 1}

    outcome = Outcome(b"\x00\xff", PROTOBUF, failed=True, effect=Effect.CLEARED)
    store.finish_operation("r1", outcome, next_seq=2).result(5)
    ended = store.outcome("r1")
    assert ended is not None
    assert ended.outcome == outcome
    assert store.unfinished() == []
    assert store.counts()["queued"] == {}
    model = store.model(MODEL)
    assert model is not None
    assert model.next_seq == 2


def test_a_repeated_request_gets_the_first_one_s_id(store: Store) -> None:
    assert store.add_operation(step("r1", 1)).result(5) == ("r1", True)
    assert store.add_operation(step("r2", 1)).result(5) == ("r1", False)
    # training operations of all kinds share one numbering; samples have their own
    assert store.add_operation(step("r3", 1, OperationKind.OPTIM_STEP)).result(5) == ("r1", False)
    assert store.add_operation(step("r4", 1, OperationKind.SAMPLE)).result(5) == ("r4", True)
    assert store.add_operation(step("r5", 1, scope="s:train:1")).result(5) == ("r5", True)
    store.finish_operation("r1", OK).result(5)
    assert store.add_operation(step("r6", 1)).result(5) == ("r1", False)
    assert [op.request_id for op in store.unfinished()] == ["r4", "r5"]
    assert store.unfinished(MODEL)[0].payload == b"r4r4r4"


def test_a_sampling_seq_id_may_have_64_bits(store: Store) -> None:
    big = 2**63 - 1
    assert store.add_operation(step("r1", big, OperationKind.SAMPLE)).result(5) == ("r1", True)
    assert store.unfinished()[0].seq_id == big
    with pytest.raises(StoreError):
        store.add_operation(step("r2", big + 1, OperationKind.SAMPLE)).result(5)
    assert store.add_operation(step("r3", 1)).result(5) == ("r3", True)


def test_another_owner_s_operation_is_not_given_away(store: Store) -> None:
    store.add_operation(step("r1", 1)).result(5)
    with pytest.raises(StoreError, match="another owner"):
        store.add_operation(step("r2", 1, owner="bob")).result(5)


def test_queues_are_bounded_for_each_owner_and_for_all(store: Store) -> None:
    for seq in range(4):
        store.add_operation(step(f"a{seq}", seq)).result(5)
    with pytest.raises(QueueFullError, match="4 of your operations"):
        store.add_operation(step("a4", 4)).result(5)
    assert store.outcome("a4") is None
    assert store.add_operation(step("again", 3)).result(5) == ("a3", False)  # known ones are answered all the same
    for seq in range(2):
        store.add_operation(step(f"b{seq}", seq, scope="t:train:0", owner="bob")).result(5)
    with pytest.raises(QueueFullError, match="6 operations are already waiting on this server"):
        store.add_operation(step("b2", 2, scope="t:train:0", owner="bob")).result(5)
    store.finish_operation("a0", OK).result(5)
    assert store.add_operation(step("a4", 4)).result(5) == ("a4", True)
    store.forget_session("t").result(5)
    store.finish_operation("a1", OK).result(5)
    assert store.add_operation(step("a5", 5)).result(5) == ("a5", True)


def test_the_bytes_that_wait_are_bounded_for_each_owner_after_a_restart_too(tmp_path: Path) -> None:
    def large(seq: int, owner: str = "alice") -> Operation:
        return replace(step(f"{owner}{seq}", seq, scope=f"{owner}:train:0", owner=owner), payload=bytes(60))

    store = Store(tmp_path, max_queued_bytes_per_owner=100)
    for seq in range(2):
        store.add_operation(large(seq)).result(5)
    with pytest.raises(QueueFullError, match="120 bytes of your operations are already waiting"):
        store.add_operation(large(2)).result(5)
    store.add_operation(large(0, "bob")).result(5)
    store.close()
    store = Store(tmp_path, max_queued_bytes_per_owner=100)
    with pytest.raises(QueueFullError, match="120 bytes"):
        store.add_operation(large(2)).result(5)
    store.finish_operation("alice0", OK).result(5)
    store.add_operation(large(2)).result(5)
    with pytest.raises(QueueFullError, match="120 bytes"):
        store.add_operation(large(3)).result(5)
    store.close()


def test_queues_are_bounded_after_a_restart_too(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seq in range(3):
        store.add_operation(step(f"r{seq}", seq))
    store.finish_operation("r0", OK).result(5)
    store.close()
    store = Store(tmp_path, max_queued_per_owner=2)
    with pytest.raises(QueueFullError):
        store.add_operation(step("r3", 3)).result(5)
    store.close()


def test_an_operation_ends_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    run(store, step("r1", 1))
    with caplog.at_level(logging.WARNING):
        store.finish_operation("r1", Outcome(b"other", JSON, failed=True), next_seq=9).result(5)
    assert "r1" in caplog.text
    stored, model = store.outcome("r1"), store.model(MODEL)
    assert stored is not None
    assert model is not None
    assert (stored.outcome, model.next_seq) == (OK, 2)
    with pytest.raises(StoreError, match="no request r2"):
        store.finish_operation("r2", OK).result(5)


def test_next_seq_never_falls(store: Store) -> None:
    run(store, step("r5", 5))
    run(store, step("r2", 2))
    model = store.model(MODEL)
    assert model is not None
    assert model.next_seq == 6


def test_unfinished_is_in_order(store: Store) -> None:
    for request, scope, seq in (("c", "s:train:1", 2), ("a", MODEL, 3), ("d", "s:train:1", 1), ("b", MODEL, 11)):
        store.add_operation(step(request, seq, scope=scope)).result(5)
    assert [op.request_id for op in store.unfinished()] == ["a", "b", "d", "c"]
    assert [op.request_id for op in store.unfinished("s:train:1")] == ["d", "c"]


def test_only_what_had_an_effect_is_replayed(store: Store) -> None:
    effects = [Effect.APPLIED, Effect.NONE, Effect.CLEARED, Effect.APPLIED, Effect.APPLIED]
    for seq in (5, 3, 1, 2, 4):  # they may end in any order
        run(store, step(f"r{seq}", seq), replace(OK, effect=effects[seq - 1]))
    store.add_operation(step("r6", 6)).result(5)
    run(store, step("x1", 1, scope="s:train:1"))
    replayed = store.to_replay(MODEL, 1)
    assert [(op.request_id, op.payload, effect) for op, effect in replayed] == [
        ("r3", b"r3r3r3", Effect.CLEARED),
        ("r4", b"r4r4r4", Effect.APPLIED),
        ("r5", b"r5r5r5", Effect.APPLIED),
    ]
    assert [(op.seq_id, outcome.effect) for op, outcome in store.log(MODEL)] == list(enumerate(effects, start=1))


def test_failures_are_told_with_the_time_they_ended(store: Store) -> None:
    failed = Outcome(b'{"error": "bad datum", "category": "user"}', JSON, failed=True)
    began = time.time()
    for seq, outcome in ((1, failed), (2, OK), (3, failed)):
        run(store, step(f"r{seq}", seq), outcome)
    run(store, step("x1", 4, scope="s:train:1"), failed)
    assert [(op.seq_id, outcome) for op, outcome, _ in store.failures(MODEL, 0)] == [(1, failed), (3, failed)]
    [(operation, _, ended_at)] = store.failures(MODEL, 1)
    assert operation.payload == b"r3r3r3"
    assert began <= ended_at <= time.time()


def test_a_saved_state_drops_what_it_covers(store: Store) -> None:
    for seq in range(1, 5):
        run(store, step(f"r{seq}", seq))
    store.add_operation(step("r5", 5)).result(5)
    store.set_saved_state(MODEL, "snap-1", 2, retain=True).result(5)
    assert len(store.log(MODEL)) == 4
    store.set_saved_state(MODEL, "snap-2", 3, retain=False).result(5)
    model = store.model(MODEL)
    assert model is not None
    assert (model.saved_state, model.saved_state_seq) == ("snap-2", 3)
    assert [op.seq_id for op, _ in store.log(MODEL)] == [4]
    assert [op.seq_id for op, _ in store.to_replay(MODEL, 3)] == [4]
    assert store.outcome("r1") is not None  # the results are still owed to the client
    assert [op.seq_id for op in store.unfinished()] == [5]
    with pytest.raises(StoreError, match="payload of its operation 1 is gone"):
        store.to_replay(MODEL, 0)
    with pytest.raises(StoreError, match="no model"):
        store.set_saved_state("other", "snap", 1, retain=False).result(5)


def test_results_expire(store: Store) -> None:
    run(store, step("delivered", 1))
    run(store, step("undelivered", 2))
    store.set_saved_state(MODEL, "snap", 2, retain=False).result(5)
    store.add_operation(step("waiting", 3)).result(5)
    store.mark_delivered("delivered").result(5)
    stored = store.outcome("delivered")
    assert stored is not None
    assert stored.delivered_at == pytest.approx(time.time(), abs=5)

    now = time.time()
    assert store.prune(now + 0.9 * HOUR).result(5) == 0
    assert store.prune(now + 1.1 * HOUR).result(5) == 1
    assert (store.outcome("delivered"), store.outcome("undelivered") is None) == (None, False)
    assert store.prune(now + 25 * HOUR).result(5) == 1
    assert store.outcome("undelivered") is None
    assert [op.request_id for op in store.unfinished()] == ["waiting"]
    assert store._rows(text("SELECT count(*) FROM operations"))[0][0] == 1


def test_the_first_delivery_counts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(store, step("r1", 1))
    store.mark_delivered("r1").result(5)
    first = store.outcome("r1")
    monkeypatch.setattr(time, "time", lambda: 9e9)
    store.mark_delivered("r1").result(5)
    assert store.outcome("r1") == first
    store.mark_delivered("unknown").result(5)


def test_an_expired_operation_can_still_be_replayed_and_is_not_run_again(store: Store) -> None:
    run(store, step("r1", 1))
    store.prune(time.time() + 25 * HOUR).result(5)
    assert store.outcome("r1") is None
    assert [op.request_id for op, _ in store.to_replay(MODEL, 0)] == ["r1"]
    assert store.add_operation(step("r2", 1)).result(5) == ("r1", False)
    store.set_saved_state(MODEL, "snap", 1, retain=False).result(5)
    assert store.prune(time.time() + 25 * HOUR).result(5) == 0  # its result is counted once


def test_a_lost_gradient_is_remembered_until_a_saved_state_covers_it(store: Store) -> None:
    failed = Outcome(b'{"error": "bad datum", "category": "user"}', JSON, failed=True)
    run(store, step("r1", 1), failed)
    store.mark_delivered("r1").result(5)
    assert store.prune(time.time() + 25 * HOUR).result(5) == 0
    assert [(op.seq_id, outcome) for op, outcome, _ in store.failures(MODEL, 0)] == [(1, failed)]
    store.set_saved_state(MODEL, "snap", 1, retain=False).result(5)
    assert store.prune(time.time() + 25 * HOUR).result(5) == 1
    assert store.outcome("r1") is None


def test_the_file_shrinks_when_results_expire(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seq in range(100):
        store.add_operation(step(f"r{seq}", seq, OperationKind.SAMPLE))
        store.finish_operation(f"r{seq}", Outcome(bytes(100_000), PROTOBUF)).result(5)
    assert store.prune(time.time() + 25 * HOUR).result(5) == 100
    store.close()
    assert (tmp_path / "service.sqlite").stat().st_size < 1_000_000
