"""Requests that begin alike are read once, images and all; others never share, and nothing that is sampled changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tinker import types
from tiny import perturb
from tiny_vision import END_ID, START_ID, VISION_FAMILIES, chunk_of, picture, text

from nat_plugin_evsys.engine.model.images import read_model_input
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.sampling import image_runner
from nat_plugin_evsys.engine.sampling.exact_prefixes import ExactPrefixes
from nat_plugin_evsys.engine.sampling.exact_runner import ExactDecoder, ExactRunner
from nat_plugin_evsys.engine.sampling.row_decoder import Context

GREEDY = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])


Parts = tuple[list[int] | int, ...]
"""Text, and the seeds of pictures, all of one size."""


@pytest.fixture(params=VISION_FAMILIES)
def base(request: Any, vision_base_of: Any) -> BaseModel:
    found: BaseModel = vision_base_of(request.param)
    return found


@pytest.fixture
def reusing(base: BaseModel) -> Iterator[Sampler]:
    made = Sampler(base)
    yield made
    made.close()


@pytest.fixture
def plain(base: BaseModel) -> Iterator[Sampler]:
    made = Sampler(base, prefix_cache_bytes=0)
    yield made
    made.close()


def prompt(parts: Parts) -> types.ModelInput:
    chunks: list[Any] = []
    for part in parts:
        chunks += [text(*part)] if isinstance(part, list) else [text(START_ID), chunk_of(picture(part)), text(END_ID)]
    return types.ModelInput(chunks=chunks)


def raises(error: Exception) -> Any:
    def call(*_given: Any) -> None:
        raise error

    return call


def sampled(client: Any, parts: Parts, count: int = 1) -> Any:
    return client.sample(prompt(parts), count, GREEDY).result(120)


def fed(sampler: Sampler, client: Any, parts: Parts, count: int = 1) -> tuple[int, Any]:
    before = sampler.fed_tokens
    found = sampled(client, parts, count)
    return sampler.fed_tokens - before, found


def test_the_same_beginning_is_read_once(base: BaseModel, reusing: Sampler) -> None:
    client = reusing.client(None, 0)
    first: Parts = ([5, 6], 1, [7, 8])
    size = base.vision.measure(chunk_of(picture(1)).data, "png", "it").tokens + 6  # type: ignore[union-attr]
    decoded = 3  # of four tokens; the last is not read
    cost, found = fed(reusing, client, first)
    assert image_runner._WAYS[base] == (True, True)
    assert cost == size + decoded
    assert fed(reusing, client, first, 2)[0] == 2 * decoded
    # Another question about the same picture: from its end, where a marker stands.
    assert fed(reusing, client, ([5, 6], 1, [9, 9, 9]))[0] == 4 + decoded
    # The next turn: the last sampled token, and what is new.
    reply = list(found.sequences[0].tokens)
    assert fed(reusing, client, (*first, reply, [4, 4]))[0] == 3 + decoded
    # Another picture in the same words, of the same size, and the same picture elsewhere: all of it.
    assert fed(reusing, client, ([5, 6], 2, [7, 8]))[0] == size + decoded
    assert fed(reusing, client, ([5], 1, [7, 8]))[0] == size - 1 + decoded
    # Other weights.
    adapter = perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), 3)
    assert fed(reusing, reusing.client(adapter, 1), first)[0] == size + decoded


def test_what_is_kept_of_a_policy_goes_with_it(base: BaseModel, reusing: Sampler) -> None:
    adapter = perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), 3)
    client = reusing.client(adapter, 1)
    sampled(client, ([5], 1, [6]))
    assert reusing._seen is not None
    assert reusing._seen.nbytes > 0
    del client
    sampled(reusing.client(None, 0), ([5, 6],))
    assert reusing._seen.nbytes == 0


def test_a_row_that_cannot_be_kept_is_out_all_the_same(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, images = read_model_input(prompt(([5], 1, [6])).chunks, base.vision, "the prompt", "only text is read")
    decoder = ExactDecoder(ExactRunner(base, cached=True, extends=True), None, prefixes=(ExactPrefixes(1 << 30), 0))
    with torch.inference_mode():
        decoder.join(Context(ids, images=images))
        decoder.join(Context([4, 3, 2]))
        decoder.step([])
        alone = ExactDecoder(ExactRunner(base, cached=True), None)
        alone.join(Context([4, 3, 2]))
        alone.step([])
        monkeypatch.setattr(ExactPrefixes, "keep", raises(MemoryError("no memory for 3 MiB")))
        with pytest.raises(MemoryError):
            decoder.remove(0, ids)
        torch.testing.assert_close(decoder.step([7])[0], alone.step([7])[0])


@pytest.mark.parametrize("seed", range(3))
def test_nothing_changes(base: BaseModel, reusing: Sampler, plain: Sampler, seed: int) -> None:
    """Random conversations about three pictures, of two policies, at once and one after the other."""
    draw = random.Random(seed)
    adapter = perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), 3)
    clients = [(sampler.client(None, 0), sampler.client(adapter, 1)) for sampler in (reusing, plain)]
    known: list[Parts] = [([5], 1, [6]), ([5], 2, [6])]
    for _ in range(6):
        batch: list[tuple[int, Parts]] = []
        for _ in range(draw.randint(1, 3)):
            start, more = draw.choice(known), [draw.randint(0, 99) for _ in range(draw.randint(1, 3))]
            batch.append(
                (draw.randint(0, 1), (*start, draw.randint(1, 3), more) if draw.random() < 0.3 else (*start, more))
            )
        futures = [[of[which].sample(prompt(parts), 2, GREEDY) for which, parts in batch] for of in clients]
        for (_, parts), one, other in zip(batch, *futures, strict=True):
            found, expected = one.result(120), other.result(120)
            for here, there in zip(found.sequences, expected.sequences, strict=True):
                assert list(here.tokens) == list(there.tokens)
                torch.testing.assert_close(torch.tensor(here.logprobs), torch.tensor(there.logprobs), atol=1e-5, rtol=0)
            known += [parts, (*parts, list(found.sequences[0].tokens))]
    assert reusing.fed_tokens < plain.fed_tokens
