"""The endpoint in front of the engine's own sampler and real (tiny, random or constructed) models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import torch
from constructed import never_saying, reciting, undecided
from tiny import perturb, tiny_model
from transformers import PreTrainedModel

from nat_plugin_evsys.calls import RUN_ID_HEADER, Call
from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.policy.chat import ChatRenderer

MODEL = "builtin/tiny"
MESSAGES: list[Any] = [{"role": "user", "content": "What is 2 + 3?"}]


def tiny(tokenizer: Any, **changes: Any) -> PreTrainedModel:
    """A random model of this tokenizer's vocabulary."""
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096, "tie_word_embeddings": False}
    return tiny_model("qwen3", **shape, eos_token_id=tokenizer.eos_token_id, **changes)


@pytest.fixture(scope="module")
def base(tokenizer: Any) -> BaseModel:
    """It says anything but the token that ends a reply."""
    return wrap_model(MODEL, never_saying(tiny(tokenizer), tokenizer.eos_token_id), tokenizer)


@pytest.fixture(scope="module")
def adapter(base: BaseModel) -> LoraAdapter:
    """An adapter whose B is not zero any more."""
    return perturb(LoraAdapter.create(base.model, rank=4, alpha=8, seed=0)).snapshot()


@pytest.fixture
def make_sampler() -> Iterator[Callable[..., Sampler]]:
    """``make_sampler(base, **options)``; closed when the test ends."""
    made: list[Sampler] = []

    def make(base: BaseModel, **options: Any) -> Sampler:
        made.append(Sampler(base, max_batch_size=32, **options))
        return made[-1]

    yield make
    for sampler in made:
        sampler.close()


@pytest.fixture
def sampler(base: BaseModel, make_sampler: Callable[..., Sampler]) -> Sampler:
    # Without kept prefixes the same request is the same computation, bit for bit.
    return make_sampler(base, prefix_cache_bytes=0)


@pytest.fixture
def served(serve: Any, sampler: Sampler, adapter: LoraAdapter) -> Any:
    return serve(sampling_client=sampler.client(adapter, policy_version=3))


async def ask(served: Any, run: str | None = None, **options: Any) -> Any:
    headers = {RUN_ID_HEADER: run} if run else {}
    request: dict[str, Any] = dict(model=MODEL, messages=MESSAGES, temperature=1.0, max_tokens=24)
    extra = {"return_token_ids": True, **options.pop("extra_body", {})}
    async with served.client() as client:
        answer = await client.chat.completions.create(**{**request, **options}, extra_headers=headers, extra_body=extra)
        return [chunk async for chunk in answer] if options.get("stream") else answer


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_recorded_logprobs_are_the_models(
    served: Any, base: BaseModel, adapter: LoraAdapter, renderer: ChatRenderer, temperature: float
) -> None:
    served.recorder.open_run("run", "rollout", 5)
    answer = await ask(served, "run", temperature=temperature, n=3, logprobs=True)
    calls = served.recorder.close_run("run")
    assert [len(call.output_ids) for call in calls] == [24] * 3
    assert len({tuple(call.output_ids) for call in calls}) == 3
    for choice, call in zip(answer.choices, calls, strict=True):
        assert call.prompt_ids == answer.model_extra["prompt_token_ids"] == renderer.render(MESSAGES)
        assert call.output_ids == choice.model_extra["token_ids"]
        assert call.policy_version == 3
        assert call.logprobs == [entry.logprob for entry in choice.logprobs.content]
        assert call.reply["content"] == renderer.parse(call.output_ids).content
        with torch.no_grad(), applied(adapter):
            logits = base.model(input_ids=torch.tensor([call.prompt_ids + call.output_ids])).logits[0].float()
        start = len(call.prompt_ids) - 1
        plain = torch.log_softmax(logits[start:-1] / temperature, dim=-1)
        expected = plain[torch.arange(len(call.output_ids)), call.output_ids]
        assert torch.tensor(call.logprobs) == pytest.approx(expected.numpy(), abs=1e-4)


async def test_a_stream_records_the_same_call(served: Any) -> None:
    records: list[Call] = []
    for stream in (False, True):
        run = f"run {stream}"
        served.recorder.open_run(run, "rollout", 9)
        answer = await ask(served, run, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            ids = [i for chunk in answer for i in chunk.choices[0].model_extra.get("token_ids") or []]
            assert len(answer) > 5
        else:
            text, ids = answer.choices[0].message.content, answer.choices[0].model_extra["token_ids"]
        (call,) = served.recorder.close_run(run)
        assert (call.reply["content"], call.output_ids) == (text, ids)
        records.append(call)
    plain, streamed = records
    for field in ("prompt_ids", "output_ids", "logprobs", "reply", "stop_reason"):
        assert getattr(plain, field) == getattr(streamed, field)


async def test_a_runs_first_call_is_told_before_it_is_recorded(served: Any) -> None:
    calls_then: list[int] = []
    served.recorder.open_run("run", "rollout", 1, lambda: calls_then.append(served.recorder.totals.calls))
    for stream in (True, False):
        await ask(served, "run", stream=stream)
    assert calls_then == [0]


async def test_a_runs_replies_do_not_depend_on_the_other_runs(
    serve: Any, tokenizer: Any, make_sampler: Callable[..., Sampler]
) -> None:
    # Logits that are the same in every batch, to the last bit: what differs comes from the seeds.
    base = wrap_model(MODEL, undecided(tiny(tokenizer)), tokenizer)
    served = serve(sampling_client=make_sampler(base).client(None, policy_version=0))

    async def episode(run: str, seed: int) -> list[list[int]]:
        served.recorder.open_run(run, "rollout", seed)
        for _ in range(2):
            await ask(served, run, max_tokens=12)
        return [call.output_ids for call in served.recorder.close_run(run)]

    together = await asyncio.gather(*(episode(f"a{seed}", seed) for seed in range(16)))
    alone = [await episode(f"b{seed}", seed) for seed in (3, 11)]
    assert [together[3], together[11]] == alone
    assert len({tuple(ids) for calls in together for ids in calls}) == 32


async def test_stop_strings_end_the_sampling(
    serve: Any, tokenizer: Any, renderer: ChatRenderer, make_sampler: Callable[..., Sampler]
) -> None:
    said = tokenizer.encode(" The quick fox jumps over a lazy dog")
    model = tiny(tokenizer, hidden_size=64, head_dim=16)
    base = wrap_model(MODEL, reciting(model, [renderer.render(MESSAGES)[-1], *said]), tokenizer)
    served = serve(sampling_client=make_sampler(base).client(None, policy_version=0))
    whole = (await ask(served, max_tokens=len(said))).choices[0]
    assert whole.model_extra["token_ids"] == said
    assert whole.finish_reason == "length"
    text = whole.message.content
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = (await ask(served, max_tokens=len(said), stop=[stop])).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == text[: text.index(stop)]
    ids = cut.model_extra["token_ids"]
    assert ids == said[: len(ids)]
    assert 1 < len(ids) < len(said)


async def test_top_logprobs_of_greedy_sampling(served: Any) -> None:
    answer = await ask(served, temperature=0.0, logprobs=True, top_logprobs=2, max_tokens=4)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 4
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob


async def test_the_context_window(served: Any, base: BaseModel) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{base.context_length}") as error:
        await ask(served, messages=[{"role": "user", "content": "word " * base.context_length}])
    assert error.value.code == "context_length_exceeded"


async def test_a_client_that_goes_away_frees_the_sampler(served: Any, sampler: Sampler) -> None:
    asking = asyncio.create_task(ask(served, max_tokens=3000))  # never ends by itself
    while sampler.fed_tokens < 100:
        assert not asking.done(), asking.result()
        await asyncio.sleep(0.005)
    asking.cancel()
    deadline = time.monotonic() + 10
    before = -1
    while before != sampler.fed_tokens:
        assert time.monotonic() < deadline
        before = sampler.fed_tokens
        await asyncio.sleep(0.2)
    assert before < 3000
    assert (await ask(served, max_tokens=2)).usage.completion_tokens <= 2


async def test_what_shapes_the_distribution_is_sampled_and_recorded(
    served: Any, base: BaseModel, adapter: LoraAdapter, renderer: ChatRenderer
) -> None:
    """Penalties, biases and min_p are named in the call, for no learner computes them; min_tokens and bans are not."""
    served.recorder.open_run("run", "rollout", 5)
    banned = renderer.encode("abcdefgh")
    shaped = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "logit_bias": {"5": 3, "9": -100}}
    extra = {"min_p": 0.001, "repetition_penalty": 1.25, "min_tokens": 4}
    await ask(served, "run", max_tokens=6, **shaped, extra_body=extra)
    await ask(served, "run", max_tokens=6, logit_bias={str(i): -100 for i in banned}, extra_body={"min_tokens": 4})
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}}
    await ask(served, "run", max_tokens=6, **neutral, extra_body={"min_p": 0, "repetition_penalty": 1, "min_tokens": 0})
    first, second, third = served.recorder.close_run("run")
    assert first.shaped == {
        **{"repetition_penalty": 1.25, "frequency_penalty": 0.5, "presence_penalty": 0.25, "min_p": 0.001},
        "logit_bias": {5: 3.0},
    }
    assert (second.shaped, third.shaped) == ({}, {})
    assert not set(banned) & set(second.output_ids)
    for call in (second, third):
        with torch.no_grad(), applied(adapter):
            logits = base.model(input_ids=torch.tensor([call.prompt_ids + call.output_ids])).logits[0].float()
        own = logits[len(call.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = own[torch.arange(len(call.output_ids)), call.output_ids]
        assert torch.tensor(call.logprobs) == pytest.approx(expected.numpy(), abs=1e-4)


async def test_prompt_logprobs_are_the_models(served: Any, base: BaseModel, adapter: LoraAdapter) -> None:
    answer = await ask(served, max_tokens=1, extra_body={"prompt_logprobs": 3, "return_tokens_as_token_ids": True})
    ids, found = answer.model_extra["prompt_token_ids"], answer.model_extra["prompt_logprobs"]
    with torch.no_grad(), applied(adapter):
        own = base.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert found[0] is None
    assert len(found) == len(ids)
    for at, entries in enumerate(found[1:], 1):
        assert {str(ids[at])} < set(entries)
        ranked = {entry["rank"]: token for token, entry in entries.items()}
        assert {1, 2, 3} <= set(ranked)
        assert float(own[at - 1].max()) == pytest.approx(entries[ranked[1]]["logprob"], abs=1e-4)
        for token, entry in entries.items():
            assert entry["decoded_token"] == f"token_id:{token}"
            assert entry["logprob"] == pytest.approx(float(own[at - 1, int(token)]), abs=1e-4)
