"""Every code block and every signature of Tinker's page on ``TrainingClient``."""

from __future__ import annotations

import inspect
import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from seed_page import SeedPage, numbers

from nat_plugin_evsys import ServiceClient, TrainingClient, types

MODEL = "Qwen/Qwen2.5-7B"
PATH = "tinker://run-id/weights/checkpoint-001"


@pytest.fixture
def page(tmp_path: Path, tiny_model: str) -> Iterator[SeedPage]:
    """The page after its first block, which makes the training client, and its tokenizer."""
    given = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4]})
    with ServiceClient(store=tmp_path) as service:
        page = SeedPage("tinker", service_client=service, types=types, torch=torch, training_data=[given])
        page.run("TrainingClient", **{MODEL: tiny_model})
        page.run("get_tokenizer")
        yield page


def loss_of(page: SeedPage) -> float:
    (loss,) = numbers(r"Loss: (.*)\n", page.run("forward"))
    return loss


def logprobs_of(page: SeedPage) -> list[float]:
    (output,) = page["training_client"].forward(page["data"], "cross_entropy").result().loss_fn_outputs
    return list(output["logprobs"].data)


def test_it_trains_saves_and_goes_on(page: SeedPage, tmp_path: Path, tiny_model: str) -> None:
    # the first block: a step on the reader's data, and a sampler of what it made
    assert page["fwdbwd_result"].loss == pytest.approx(-sum(page["fwdbwd_result"].loss_fn_outputs[0]["logprobs"].data))
    assert page["optim_result"].metrics["step"] == 1
    assert page["sampling_client"].model_path.endswith("/sampler_weights/my-model")
    assert len(list(tmp_path.glob("*/sampler_weights/my-model/adapter_model.safetensors"))) == 1
    assert page["text"] == "Hello world"

    before = loss_of(page)
    assert before == pytest.approx(-sum(page["result"].loss_fn_outputs[0]["logprobs"].data))
    losses = []
    for _ in range(10):
        losses += numbers(r"Loss: (.*)\n", page.run("forward_backward"))
        page.run("optim_step")
        losses.append(page["fwdbwd_result"].loss)
    assert losses[0] == pytest.approx(before)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert page["optim_result"].metrics["step"] == 21

    shown = page.run("save_state")
    saved = page["result"].path
    assert shown == f"Saved to: {saved}\n"
    assert re.fullmatch(r"tinker://[^/]+/weights/checkpoint-001", saved)

    def after_a_step() -> float:
        page.run("optim_step")
        return loss_of(page)

    here = loss_of(page)
    further = after_a_step()
    page.run("load_state", **{PATH: saved})
    assert loss_of(page) == here
    assert after_a_step() != further, "the optimizer was not reset"
    page.run("load_state_with_optimizer", **{PATH: saved})
    assert loss_of(page) == here
    assert after_a_step() == further

    # a sampler of either checkpoint scores the first target after the first token as the trainer does
    page.run("load_state", **{PATH: saved})
    wanted = logprobs_of(page)[0]
    start = types.ModelInput.from_ints(page["tokenizer"].encode("Hw"))
    for title, replaced in (("create_sampling_client", {PATH: saved}), ("save_weights_for_sampler", {})):
        shown = page.run(title, **replaced)
        assert page["sampling_client"].compute_logprobs(start).result()[1] == pytest.approx(wanted, abs=1e-5)
    assert shown == f"Sampler weights saved to: {page['result'].path}\n"
    assert re.fullmatch(r"tinker://[^/]+/sampler_weights/sampler-001", page["result"].path)

    info = page["training_client"].get_info()
    shown = page.run("get_info")
    assert shown == f"Model ID: {info.model_id}\nBase model: {tiny_model}\nLoRA rank: 32\n"
    page.run("save_weights_and_get_sampling_client")
    (sequence,) = page["result"].sequences
    assert 1 <= len(sequence.tokens) == len(sequence.logprobs) <= 20

    mean = statistics.fmean(logprobs_of(page))
    shown = page.run("forward_backward_custom")
    assert numbers(r"Custom loss: (.*)\n", shown) == pytest.approx([mean])
    assert numbers(r"'custom_metric': ([-\d.]+)", shown) == pytest.approx([mean])
    assert not page.left


SIGNATURES = {
    "forward": ("data loss_fn", "loss_fn_config"),
    "forward_backward": ("data loss_fn", "loss_fn_config"),
    "forward_backward_custom": ("data loss_fn", ""),
    "optim_step": ("adam_params", ""),
    "save_state": ("name", ""),
    "load_state": ("path", ""),
    "load_state_with_optimizer": ("path", ""),
    "save_weights_for_sampler": ("name", ""),
    "get_info": ("", ""),
    "create_sampling_client": ("model_path", "retry_config"),
    "save_weights_and_get_sampling_client": ("", "name retry_config"),
}
"""Of the page: what a call needs, and what is None unless given. Each has an ``_async`` twin."""


@pytest.mark.parametrize(("name", "needed", "optional"), [(name, *written) for name, written in SIGNATURES.items()])
def test_the_signature_is_that_of_the_page(name: str, needed: str, optional: str) -> None:
    twin = getattr(TrainingClient, f"{name}_async")
    assert inspect.iscoroutinefunction(twin)
    for call in (getattr(TrainingClient, name), twin):
        signature = inspect.signature(inspect.unwrap(call))
        signature.bind(None, *needed.split())
        signature.bind(None, *needed.split(), *optional.split())
        signature.bind(None, **dict.fromkeys(needed.split() + optional.split()))
        assert [signature.parameters[each].default for each in optional.split()] == [None] * len(optional.split())
