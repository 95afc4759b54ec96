"""Long polls over a real store, without a server around them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nat_plugin_evsys.errors import Refusal
from nat_plugin_evsys.service.http.pending import Pending
from nat_plugin_evsys.service.http.presence import Presence
from nat_plugin_evsys.service.http.prometheus import ServiceMetrics
from nat_plugin_evsys.service.http.signing import UrlSigner
from nat_plugin_evsys.service.store.operations import JSON, Operation, Outcome
from nat_plugin_evsys.service.store.store import ModelRow, SessionRow, Store
from nat_plugin_evsys.service.wire.kinds import OperationKind


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    opened.add_session(SessionRow("s", "me")).result()
    opened.add_model(ModelRow("s:train:0", "s", "me", 0, "base", 2)).result()
    yield opened
    opened.close()


def add(store: Store, request_id: str, seq: int, owner: str = "me") -> str:
    operation = Operation(request_id, owner, OperationKind.OPTIM_STEP, "s:train:0", seq, b"{}")
    return store.add_operation(operation).result()[0]


def end(store: Store, request_id: str) -> None:
    store.finish_operation(request_id, Outcome(b'{"metrics": {}}', JSON)).result()


async def test_a_poll_is_woken_by_the_outcome_of_another_thread(store: Store) -> None:
    pending = Pending(store, ServiceMetrics(), poll_seconds=10)
    add(store, "a", 1)
    polls = [asyncio.create_task(pending.outcome("a", "me")) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert pending.waiting == 3
    started = time.monotonic()
    threading.Thread(target=end, args=(store, "a")).start()
    for stored in await asyncio.gather(*polls):
        assert stored is not None
        assert stored.outcome is not None
        assert stored.outcome.body == b'{"metrics": {}}'
    assert time.monotonic() - started < 2
    assert pending.waiting == 0


async def test_an_outcome_that_came_first_is_given_at_once_and_noted_as_delivered(store: Store) -> None:
    pending = Pending(store, ServiceMetrics(), poll_seconds=10)
    add(store, "a", 1)
    end(store, "a")
    stored = await pending.outcome("a", "me")
    assert stored is not None
    await asyncio.sleep(0.2)
    again = store.outcome("a")
    assert again is not None
    assert again.delivered_at is not None


async def test_a_poll_ends_when_its_time_is_up_and_when_the_server_closes(store: Store) -> None:
    pending = Pending(store, ServiceMetrics(), poll_seconds=0.2)
    add(store, "a", 1)
    assert await pending.outcome("a", "me") is None
    held = Pending(store, ServiceMetrics(), poll_seconds=30)
    poll = asyncio.create_task(held.outcome("a", "me"))
    await asyncio.sleep(0.05)
    held.close()
    assert await asyncio.wait_for(poll, 2) is None
    assert await asyncio.wait_for(held.outcome("a", "me"), 2) is None


async def test_anothers_request_answers_like_an_unknown_one(store: Store) -> None:
    pending = Pending(store, ServiceMetrics(), poll_seconds=5)
    add(store, "a", 1)
    said = []
    for request_id, owner in (("a", "you"), ("b", "me")):
        with pytest.raises(Refusal) as caught:
            await pending.outcome(request_id, owner)
        assert caught.value.status == 404
        said.append(str(caught.value).replace(f"'{request_id}'", "ID"))
    assert said[0] == said[1]


async def test_many_polls_are_held_at_once(store: Store) -> None:
    pending = Pending(store, ServiceMetrics(), poll_seconds=20)
    ids = [add(store, f"r{n}", n) for n in range(1, 301)]
    polls = [asyncio.create_task(pending.outcome(each, "me")) for each in ids]
    await asyncio.sleep(0.3)

    def end_all() -> None:
        for each in ids:
            store.finish_operation(each, Outcome(b"{}", JSON))
        store.finish_operation(ids[-1], Outcome(b"{}", JSON)).result()

    await asyncio.to_thread(end_all)
    assert all(stored is not None for stored in await asyncio.wait_for(asyncio.gather(*polls), 15))


def test_presence_writes_a_session_at_most_every_few_seconds(store: Store) -> None:
    presence, before = Presence(store), store.session("s")
    assert before is not None
    time.sleep(0.01)
    presence.seen("s")
    time.sleep(0.3)
    first = store.session("s")
    assert first is not None
    assert first.last_seen > before.last_seen
    presence.seen("s")
    time.sleep(0.3)
    assert store.session("s") == first


def test_signed_urls_are_for_one_path_and_end() -> None:
    signer, path = UrlSigner(), "/api/v1/downloads/a:train:0/external_weights/x/f"
    later = int(time.time()) + 60

    def signature(url: str) -> str:
        return url.rpartition("signature=")[2]

    good = signature(signer.sign(path, later))
    signer.check(path, str(later), good)
    for args in (
        (path + "x", str(later), good),
        (path, str(later + 1), good),
        (path, str(later), good[:-1] + "é"),
        (path, "", ""),
        (path, str(later), signature(UrlSigner().sign(path, later))),
        (path, "5", signature(signer.sign(path, 5))),
    ):
        with pytest.raises(Refusal) as caught:
            signer.check(*args)
        assert caught.value.status == 403
