"""Supervised finetuning: the Datums, token by token, and a training run that learns."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.training.sft import SftStep, build_sft_datums, train_sft

USER, ASSISTANT, END, TOOLS = 251, 252, 250, 253


def text(content: str) -> list[int]:
    return list(content.encode())


def render(messages: Any, tools: Any) -> list[int]:
    ids = [TOOLS] * len(tools)
    for m in messages:
        ids += [ASSISTANT if m["role"] == "assistant" else USER, *text(m["content"]), END]
    return [*ids, ASSISTANT]


def render_forgetful(messages: Any, tools: Any) -> list[int]:
    """A template that drops earlier assistant turns, as reasoning models do."""
    return render([m for m in messages if m["role"] != "assistant"], tools)


def reply(message: Any) -> list[int]:
    return [*text(message["content"]), END]


TALK = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "ef"},
]


def unshift(datum: Any) -> tuple[list[int], list[float]]:
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    tokens = datum.model_input.to_ints()
    assert tokens[1:] == targets[:-1]
    return [*tokens, targets[-1]], datum.loss_fn_inputs["weights"].tolist()


def test_turns_that_extend_one_another_share_a_datum() -> None:
    (datum,) = build_sft_datums([{"messages": TALK, "tools": [{}]}], render, reply)
    tokens, weights = unshift(datum)
    assert tokens == [TOOLS, USER, 97, 98, END, ASSISTANT, 99, END, USER, 100, END, ASSISTANT, 101, 102, END]
    trained = [t for t, w in zip(tokens[1:], weights, strict=True) if w == 1.0]
    assert trained == [99, END, 101, 102, END]
    assert set(weights) == {0.0, 1.0}


def test_rewritten_history_begins_a_new_datum() -> None:
    one, two = build_sft_datums([{"messages": TALK}], render_forgetful, reply)
    assert unshift(one)[0] == [USER, 97, 98, END, ASSISTANT, 99, END]
    assert unshift(two)[0] == [USER, 97, 98, END, USER, 100, END, ASSISTANT, 101, 102, END]
    assert unshift(two)[1] == [0.0] * 7 + [1.0] * 3


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({}, "no list of messages"),
        ({"messages": "hi"}, "no list of messages"),
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
    ],
)
def test_bad_examples(example: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"examples\[1\].*{message}"):
        build_sft_datums([{"messages": TALK}, example], render, reply)


def test_an_empty_reply_is_refused() -> None:
    with pytest.raises(DataError, match="message 1 renders to"):
        build_sft_datums([{"messages": TALK}], render, lambda m: [])


def demonstrations() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": word}]}
        for word in ("sun", "moon", "star", "sky", "sea")
    ]


async def test_it_learns_repeatably(make_backend: Any) -> None:
    datums = build_sft_datums(demonstrations(), render, reply)
    settings: dict[str, Any] = {"epochs": 12, "batch_size": 2, "learning_rate": 2e-2, "seed": 1}
    seen: list[SftStep] = []
    first = await train_sft(await make_backend(), datums, **settings, on_step=seen.append)
    again = await train_sft(await make_backend(), datums, **settings)
    other = await train_sft(await make_backend(), datums, **{**settings, "seed": 2})
    assert seen == first == again
    assert other != first
    assert [s.step for s in first] == list(range(1, 37))
    assert all(s.total_steps == 36 for s in first)
    assert [s.epoch for s in first[::3]] == list(range(1, 13))
    assert first[0].learning_rate == 2e-2
    assert first[18].learning_rate == pytest.approx(1e-2)
    assert first[-1].learning_rate == pytest.approx(2e-2 / 36)
    epoch_tokens = sum(s.tokens for s in first[:3])
    assert epoch_tokens == sum(len(d["messages"][1]["content"]) + 1 for d in demonstrations())
    assert first[0].loss > 4
    assert sum(s.loss for s in first[-3:]) / 3 < 0.5 * first[0].loss


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}])
async def test_bad_settings(settings: dict[str, Any], make_backend: Any) -> None:
    datums = build_sft_datums(demonstrations(), render, reply)
    with pytest.raises(ConfigError, match="sft needs"):
        await train_sft(
            await make_backend(), datums, **{"epochs": 1, "batch_size": 1, "learning_rate": 1.0, **settings}
        )


async def test_no_datums(make_backend: Any) -> None:
    with pytest.raises(DataError, match="no Datums"):
        await train_sft(await make_backend(), [], epochs=1, batch_size=1, learning_rate=1.0)


async def test_cancelling_leaves_the_backend_usable(make_backend: Any) -> None:
    backend = await make_backend()
    datums = build_sft_datums(demonstrations(), render, reply)
    task = asyncio.create_task(train_sft(backend, datums, epochs=1000, batch_size=1, learning_rate=1e-3))
    for _ in range(10_000):
        if backend.step >= 3:
            break
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(await train_sft(backend, datums, epochs=1, batch_size=5, learning_rate=1e-3)) == 1
