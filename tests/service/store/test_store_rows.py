"""Sessions, models, samplers and publications: what was stored is found again, also by the next process."""

from __future__ import annotations

from pathlib import Path

import pytest

from nat_plugin_evsys.errors import StoreError
from nat_plugin_evsys.service.store.operations import JSON, Operation, Outcome
from nat_plugin_evsys.service.store.store import ModelRow, SamplerRow, SessionRow, Store
from nat_plugin_evsys.service.wire.kinds import OperationKind

SESSION = SessionRow(
    session_id="s1",
    owner="alice",
    created_at=10.5,
    last_seen=11.0,
    tags=["a", "ü"],
    user_metadata={"k": {"nested": [1, None]}},
    sdk_version="0.38.0",
    display_name="first",
    project_id="p",
)
MODEL = ModelRow(
    model_id="s1:train:0",
    session_id="s1",
    owner="alice",
    model_seq_id=0,
    base_model="tiny",
    lora_rank=8,
    lora_seed=7,
    train_mlp=False,
    user_metadata={"run": "x"},
    created_at=12.0,
)
SAMPLER = SamplerRow(
    sampler_id="s1:sample:2",
    session_id="s1",
    owner="alice",
    seq_id=2,
    base_model="tiny",
    directory="abc",
    model_id="s1:train:0",
    step=3,
    created_at=13.0,
)


@pytest.fixture
def store(tmp_path: Path):
    store = Store(tmp_path / "store")
    yield store
    store.close()


def fill(store: Store) -> None:
    for session_id, owner, seen in (("s1", "alice", 11.0), ("s2", "bob", 20.0), ("s10", "alice", 5.0)):
        row = SESSION if session_id == "s1" else SessionRow(session_id, owner, created_at=seen, last_seen=seen)
        store.add_session(row).result(5)
    store.add_model(MODEL).result(5)
    store.add_model(ModelRow("s1:train:1", "s1", "alice", 1, "tiny", 4, created_at=14.0)).result(5)
    store.add_model(ModelRow("s10:train:0", "s10", "alice", 0, "tiny", 4, created_at=15.0)).result(5)
    store.add_sampler(SAMPLER).result(5)
    store.add_sampler(SamplerRow("s10:sample:0", "s10", "alice", 0, "tiny", model_path="tinker://x")).result(5)


def test_rows_are_found_as_they_were(store: Store) -> None:
    fill(store)
    assert (store.session("s1"), store.model("s1:train:0"), store.sampler("s1:sample:2")) == (SESSION, MODEL, SAMPLER)
    assert (store.session("s3"), store.model("x"), store.sampler("s1:train:0")) == (None, None, None)
    assert store.counts() == {"sessions": 3, "models": 3, "samplers": 2, "queued": {}}


def test_rows_are_found_by_the_next_process(tmp_path: Path) -> None:
    store = Store(tmp_path)
    fill(store)
    store.close()
    store = Store(tmp_path)
    assert (store.session("s1"), store.model("s1:train:0"), store.sampler("s1:sample:2")) == (SESSION, MODEL, SAMPLER)
    store.close()


def test_lists_are_of_one_owner_oldest_first(store: Store) -> None:
    fill(store)
    assert [row.session_id for row in store.sessions()] == ["s10", "s1", "s2"]
    assert [row.session_id for row in store.sessions(owner="alice")] == ["s10", "s1"]
    assert [row.session_id for row in store.sessions(unseen_since=20.0)] == ["s10", "s1"]
    assert [row.session_id for row in store.sessions("bob", 20.0)] == []
    assert [row.model_id for row in store.models(owner="alice")] == ["s1:train:0", "s1:train:1", "s10:train:0"]
    assert [row.model_id for row in store.models(session_id="s1")] == ["s1:train:0", "s1:train:1"]
    assert store.models(owner="bob") == []
    assert [row.sampler_id for row in store.samplers(model_id="s1:train:0")] == ["s1:sample:2"]
    assert store.samplers(owner="bob") == []


def test_a_session_is_touched_and_finished(store: Store) -> None:
    store.add_session(SESSION).result(5)
    store.touch_session("s1", 99.0).result(5)
    store.touch_session("s1", 50.0).result(5)  # a late write does not turn the clock back
    store.touch_session("unknown", 50.0).result(5)
    store.finish_session("s1", "success").result(5)
    row = store.session("s1")
    assert row is not None
    assert (row.last_seen, row.finished) == (99.0, "success")


def test_a_session_or_model_cannot_be_stored_over(store: Store) -> None:
    fill(store)
    with pytest.raises(StoreError, match=r"could not write .*service\.sqlite: "):
        store.add_session(SESSION).result(5)
    store.add_model(ModelRow("s1:train:0", "s1", "alice", 0, "other", 99)).result(5)
    assert store.model("s1:train:0") == MODEL
    with pytest.raises(StoreError, match="another owner"):
        store.add_model(ModelRow("s1:train:0", "s1", "bob", 0, "other", 99)).result(5)
    again = SamplerRow("s1:sample:2", "s1", "alice", 2, "other", created_at=99.0)
    assert store.add_sampler(again).result(5) == SAMPLER


def test_a_model_or_sampler_needs_its_session(store: Store) -> None:
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        store.add_model(MODEL).result(5)
    with pytest.raises(StoreError, match="FOREIGN KEY"):
        store.add_sampler(SAMPLER).result(5)
    assert store.run_owner(MODEL.model_id) is None


def test_a_sampler_is_dropped(store: Store) -> None:
    fill(store)
    store.drop_sampler("s1:sample:2").result(5)
    assert [row.dropped for row in store.samplers(owner="alice")] == [True, False]


def test_publishing_can_be_taken_back(store: Store) -> None:
    path = "tinker://s1:train:0/weights/a"
    for _ in range(2):
        store.publish(path, "alice").result(5)
        assert store.is_published(path)
    assert not store.is_published(path + "b")
    store.unpublish(path).result(5)
    store.unpublish(path).result(5)
    assert not store.is_published(path)


def test_forgetting_a_session_takes_all_that_is_its_and_nothing_else(store: Store) -> None:
    fill(store)
    for request, scope in (("a", "s1:train:0"), ("b", "s1:sample:2"), ("c", "s10:train:0"), ("d", "s2:train:0")):
        kind = OperationKind.SAMPLE if "sample" in scope else OperationKind.OPTIM_STEP
        store.add_operation(Operation(request, "alice", kind, scope, 1, b"payload")).result(5)
    store.finish_operation("a", Outcome(b"{}", JSON)).result(5)
    store.forget_session("s1").result(5)

    assert [row.session_id for row in store.sessions()] == ["s10", "s2"]
    assert [row.model_id for row in store.models()] == ["s10:train:0"]
    assert [row.sampler_id for row in store.samplers()] == ["s10:sample:0"]
    assert [store.outcome(r) is None for r in "abcd"] == [True, True, False, False]
    assert [op.request_id for op in store.unfinished()] == ["c", "d"]
    assert store.log("s1:train:0") == []
    assert store.run_owner("s1:train:0") == "alice"  # its checkpoints stay, and are still hers
    assert (store.run_owner("s2:train:0"), store.counts()["samplers"]) == (None, 1)


def test_half_a_surrogate_pair_names_nothing(store: Store) -> None:
    """A Python string may have one, UTF-8 may not."""
    assert store.session("\ud800") is None
    assert store.outcome("\ud800") is None
    with pytest.raises(StoreError, match="surrogates"):
        store.add_session(SessionRow("\ud800", "alice")).result(5)
