"""Prompts with images are sampled as transformers' ``generate`` samples them, and never share across images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tinker import types
from tiny import perturb
from tiny_vision import END_ID, PLACE_ID, START_ID, VISION_FAMILIES, chunk_of, picture, processed, text, vision_model

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.sampling import image_runner

PARTS = [[5, START_ID], [END_ID, 7, 8, START_ID], [END_ID, 9, 10]]
IMAGES = (1, 2)
NEW = 12  # longer than the tiny Gemma's window together with the image


@pytest.fixture(params=VISION_FAMILIES)
def base(request: Any, vision_base_of: Any) -> BaseModel:
    found: BaseModel = vision_base_of(request.param)
    return found


@pytest.fixture
def sampler(base: BaseModel) -> Iterator[Sampler]:
    made = Sampler(base)
    yield made
    made.close()


def prompt(*seeds: int) -> types.ModelInput:
    chunks: list[Any] = [text(*PARTS[0])]
    for seed, part in zip(seeds, PARTS[1:], strict=False):
        chunks += [chunk_of(picture(seed, 24, 16 + 8 * seed)), text(*part)]
    return types.ModelInput(chunks=chunks)


def inputs_of(family: str, *seeds: int) -> dict[str, Any]:
    return processed(family, [picture(seed, 24, 16 + 8 * seed) for seed in seeds], PARTS[: len(seeds) + 1])


def test_greedy_is_generate(base: BaseModel, sampler: Sampler) -> None:
    model, inputs = vision_model(base.name), inputs_of(base.name, *IMAGES)
    stop: list[int] = []
    params = types.SamplingParams(max_tokens=NEW, temperature=0.0, stop=stop)
    client = sampler.client(None, 0)
    found = client.sample(prompt(*IMAGES), 2, params, include_prompt_logprobs=True).result(120)
    sampled = list(found.sequences[0].tokens)
    assert sampled == list(found.sequences[1].tokens)

    banned = {"suppress_tokens": [PLACE_ID, 261, 262, 263]}  # the placeholder, and ids that the tokenizer lacks
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **banned}
    made = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]  # type: ignore[operator]  # generate
    assert sampled == made.tolist()

    # The same logprobs by one pass of transformers' own over prompt and reply.
    whole = torch.cat([inputs["input_ids"][0], made])
    kinds = next(name for name in inputs if name.endswith("token_type_ids"))
    padded = torch.nn.functional.pad(inputs[kinds], (0, NEW))
    model.model.rope_deltas = None  # type: ignore[union-attr]  # generate left its own there
    with torch.no_grad():
        logits = model(**inputs | {"input_ids": whole[None], kinds: padded}).logits[0]
    expected = logits[:-1].log_softmax(-1).gather(1, whole[1:, None])[:, 0]
    first = len(whole) - NEW
    logprobs = torch.tensor(found.sequences[0].logprobs)
    torch.testing.assert_close(logprobs, expected[first - 1 :], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.tensor(found.prompt_logprobs[1:]), expected[: first - 1], atol=1e-5, rtol=0)


def test_sampled_logprobs_are_those_of_training(base: BaseModel, sampler: Sampler) -> None:
    adapter = perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), 3)
    client = sampler.client(adapter, 1)
    params = types.SamplingParams(max_tokens=6, temperature=1.0, seed=5, stop=[])
    # Requests with other images, one of text and one without an adapter at the same time.
    futures = [client.sample(prompt(seed), 1, params) for seed in IMAGES]
    beside = client.sample(types.ModelInput.from_ints([1, 2, 3]), 1, params)
    bare = sampler.client(None, 0).sample(prompt(1), 1, params)
    sequences = [future.result(120).sequences[0] for future in futures]
    assert len(beside.result(120).sequences[0].tokens) == 6
    assert bare.result(120).sequences[0].logprobs != sequences[0].logprobs

    trainable = TrainableModel(base, adapter)
    data = []
    for seed, sequence in zip(IMAGES, sequences, strict=True):
        start = prompt(seed)
        count = sum(chunk.length if hasattr(chunk, "tokens") else 0 for chunk in start.chunks)
        image = base.vision.measure(start.chunks[1].data, "png", "it").tokens  # type: ignore[union-attr]
        tokens = list(sequence.tokens)
        targets = torch.tensor([0] * (count + image - 1) + tokens)
        chunks = [*start.chunks, text(*tokens[:-1])]
        data.append(
            types.Datum(types.ModelInput(chunks=chunks), {"target_tokens": types.TensorData.from_torch(targets)})
        )
    outputs = trainable.forward_backward(data, "cross_entropy").loss_fn_outputs
    for output, sequence in zip(outputs, sequences, strict=True):
        scored = output["logprobs"].to_torch()[-6:]
        torch.testing.assert_close(scored, torch.tensor(sequence.logprobs), atol=1e-5, rtol=0)


def test_without_a_trusted_cache_it_is_as_exact(
    vision_base_of: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = vision_base_of("qwen2_5_vl")
    monkeypatch.setattr(image_runner, "_WAYS", {})
    params = types.SamplingParams(max_tokens=5, temperature=0.0, stop=[])
    with_cache = Sampler(base)
    expected = with_cache.client(None, 0).sample(prompt(1), 1, params).result(120).sequences[0]
    with_cache.close()
    assert {base: (True, True)} == image_runner._WAYS

    # Positions that go on from the number of tokens, as those of text do: what M-RoPE must not do.
    monkeypatch.setattr(image_runner, "_WAYS", {})
    monkeypatch.setattr(type(base.vision), "going_on", lambda self, position, count, images: {})
    without = Sampler(base)
    found = without.client(None, 0).sample(prompt(1), 1, params).result(120).sequences[0]
    without.close()
    assert {base: (False, False)} == image_runner._WAYS
    assert "without a cache: its logits are off" in caplog.text
    assert list(found.tokens) == list(expected.tokens)
    torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=1e-5, rtol=0)
