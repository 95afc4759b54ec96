"""Every code block of Weaver's page on training and sampling."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from seed_page import SeedPage, numbers, page_blocks

from nat_plugin_evsys import ServiceClient, types


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeedPage]:
    """The page down to the tokenizer, as its reader has it before each of the chapters."""
    monkeypatch.setenv("EVSYS_HOME", str(tmp_path))
    page = SeedPage("weaver")
    page.run("ServiceClient")
    page.run("TrainingClient")
    page.run("Getting the Tokenizer")
    yield page
    page["service_client"].close()


def keys_of(block: str) -> list[str]:
    """The keys of a mapping that the page shows, from the outside in."""
    return re.findall(r'"(\w+)":', block)


def test_no_block_is_left_out() -> None:
    assert set(re.findall(r"page\.(?:run|read)\(\"([^\"]+)\"", Path(__file__).read_text())) == set(
        page_blocks("weaver")
    )


def test_the_clients(page: SeedPage) -> None:
    assert isinstance(page["service_client"], ServiceClient)
    assert page["training_client"].get_info().lora_rank == 32
    assert page["text"] == "Hello, world!"
    assert page["tokenizer"].decode(page["tokens"]) == page["text"]


def test_training(page: SeedPage) -> None:
    tokens = page["tokens"]
    page.names |= {"input_tokens": tokens[:-1], "target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    page.run("Datum Structure")
    assert page["datum"].model_input.to_ints() == tokens[:-1]
    assert page["datum"].loss_fn_inputs["target_tokens"].tolist() == tokens[1:]
    page.run("Processing Examples")
    for datum, example in zip(page["datums"], page["examples"], strict=True):
        weights, targets = (datum.loss_fn_inputs[key].tolist() for key in ("weights", "target_tokens"))
        trained = [token for token, weight in zip(targets, weights, strict=True) if weight]
        assert page["tokenizer"].decode(trained) == example["completion"]
    page.names |= {"prompt_tokens": tokens[:2], "completion_tokens": tokens[2:5]}
    page.run("Weight Masking")
    assert page["weights"] == [0.0, 0.0, 2.0, 2.0, 2.0]

    page.run("forward_backward()")
    before = page["result"]
    metrics = before["result"]["metrics"]
    outer, *inner, loss = keys_of(page.read("forward_backward() returns"))
    assert (outer in before, [*before[outer]], loss in metrics) == (True, inner, True)
    assert metrics["loss"] == pytest.approx(mean_loss(page["datums"], before["result"]["loss_fn_outputs"]))
    page.run("optim_step()")
    again = page["training_client"].forward_backward(page["datums"], loss_fn="cross_entropy", wait=True)
    assert again["result"]["metrics"]["loss"] < metrics["loss"]
    page.run("AdamParams")
    assert page["adam_params"].model_dump() == {
        **types.AdamParams(learning_rate=1e-4).model_dump(),
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
    }
    assert page["training_client"].optim_step(page["adam_params"], wait=True)["result"]["metrics"]["step"] == 2


def mean_loss(datums: list[types.Datum], outputs: Any) -> float:
    """Per weighted token, from the logprobs."""
    pairs = [
        (weight, logprob)
        for datum, output in zip(datums, outputs, strict=True)
        for weight, logprob in zip(datum.loss_fn_inputs["weights"].tolist(), output["logprobs"].tolist(), strict=True)
    ]
    return -sum(weight * logprob for weight, logprob in pairs) / sum(weight for weight, _ in pairs)


def test_the_complete_training_loop(page: SeedPage) -> None:
    losses = numbers(r"Step \d+: loss=(-?[\d.]+)", page.run("Complete Training Loop"))
    assert len(losses) == 10
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[1:]))
    assert losses[-1] < 0.5 * losses[0]


def test_sampling(page: SeedPage) -> None:
    page.run("SamplingClient")
    named = page["sampling_client"]
    page.run("from saved weights", **{"/path/to/weights": named.model_path})
    tokens = types.ModelInput.from_ints(page["tokens"])
    assert list(page["sampling_client"].compute_logprobs(tokens)) == list(named.compute_logprobs(tokens))

    shown = page.run("sample()")
    assert shown == f"Response: {page['response']}\n"
    sequence = page["result"]["sequences"][0]
    outer, *inner = keys_of(page.read("sample() returns"))
    assert (outer in page["result"], [*sequence]) == (True, inner)
    assert len(sequence["tokens"]) == len(sequence["logprobs"]) <= 50
    assert sequence["stop_reason"] == ("length" if len(sequence["tokens"]) == 50 else "stop")
    assert all(logprob <= 0 for logprob in sequence["logprobs"])

    page.run("SamplingParams")
    longer = page["sampling_client"].sample(page["prompt"], 1, page["sampling_params"])
    assert len(longer["sequences"][0]["tokens"]) <= 100
    shown = page.run("compute_logprobs()")
    first, *others = page["logprobs"]
    assert first is None
    assert len(others) == len(page["tokens"]) - 1
    assert all(value < 0 for value in others)
    assert shown == f"Token logprobs: {[first, *others]}\n"
