"""The scripts of the Weaver and Tinker documentation, with other import lines and another model name, really run.

``seed_scripts/`` holds the documentation's own lines; only functions to call the Tinker snippets in turn, and a loop
around two of them, are added. ``weaver_blocks.txt`` has every block of Weaver's page before its complete loop, and the
two ways to a sampling client; what a block uses and the page leaves to its reader is given by the test.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nat_plugin_evsys import ServiceClient, types

SCRIPTS = Path(__file__).parent / "seed_scripts"

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``run(script, (name in it, name to use))``: what the script printed."""
    monkeypatch.setenv("EVSYS_HOME", str(tmp_path))

    def execute(script: str, model: tuple[str, str] | None = None) -> str:
        source = (SCRIPTS / script).read_text()
        if model is not None:
            assert f'"{model[0]}"' in source
            source = source.replace(f'"{model[0]}"', repr(model[1]))
        names: dict[str, object] = {"__name__": "__main__"}
        exec(compile(source, script, "exec"), names)
        names["service_client"].close()  # type: ignore[attr-defined]
        return capsys.readouterr().out

    return execute


def blocks(script: str) -> dict[str, str]:
    """The blocks of a script by their titles."""
    parts = re.split(r"^# --- (.*)\n", "# --- service\n" + (SCRIPTS / script).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found) for found in re.findall(pattern, text)]


def test_weavers_complete_training_loop(run: Run) -> None:
    losses = numbers(r"Step \d+: loss=(-?[\d.]+)", run("weaver_training_loop.txt"))
    assert len(losses) == 10
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[1:]))
    assert losses[-1] < 0.5 * losses[0]


def test_weavers_sampling(run: Run) -> None:
    shown = run("weaver_sampling.txt")
    assert re.search(r"^Response: ", shown, re.M)
    (values,) = re.findall(r"Token logprobs: \[None, (.*)\]\n", shown)
    assert all(float(value) < 0 for value in values.split(", "))


def test_tinkers_examples(run: Run, tmp_path: Path, tiny_model: str) -> None:
    shown = run("tinker_examples.txt", ("Qwen/Qwen2.5-7B", tiny_model))
    losses = numbers(r"(?m)^Loss: (.*)$", shown)
    assert len(losses) == 21
    assert losses[0] == pytest.approx(losses[1])
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[1:]))
    assert re.search(r"Saved to: tinker://[^/]+:train:0/weights/checkpoint-001\n", shown)
    assert re.search(r"Sampler weights saved to: tinker://[^/]+:train:0/sampler_weights/sampler-001\n", shown)
    assert f"Base model: {tiny_model}\nLoRA rank: 32\n" in shown
    assert re.search(r"Model ID: [0-9a-f-]+:train:0\n", shown)
    assert re.search(r"Sampled: \d+ at version 40\n", shown)
    (loss,) = numbers(r"Custom loss: (.*)\n", shown)
    assert f"'custom_metric': {loss}" in shown
    assert len(list(tmp_path.glob("checkpoints/*/sampler_weights/my-model/adapter_model.safetensors"))) == 1


def test_weavers_page_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVSYS_HOME", str(tmp_path))
    todo = blocks("weaver_blocks.txt")
    names: dict[str, Any] = {}

    def run(title: str) -> None:
        exec(compile(todo.pop(title), title, "exec"), names)

    run("service")
    assert isinstance(names["service_client"], ServiceClient)
    run("training client")
    assert names["training_client"].get_info().lora_rank == 32
    run("tokenizer")
    assert names["text"] == "Hello, world!"
    tokens = names["tokens"]
    names |= {"input_tokens": tokens[:-1], "target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    run("datum")
    assert names["datum"].loss_fn_inputs["target_tokens"].tolist() == tokens[1:]
    run("examples")
    for datum, example in zip(names["datums"], names["examples"], strict=True):
        weights, targets = (datum.loss_fn_inputs[key].tolist() for key in ("weights", "target_tokens"))
        trained = [token for token, weight in zip(targets, weights, strict=True) if weight]
        assert names["tokenizer"].decode(trained) == example["completion"]
    names |= {"prompt_tokens": tokens[:2], "completion_tokens": tokens[2:5]}
    run("weights")
    assert names["weights"] == [0.0, 0.0, 2.0, 2.0, 2.0]

    run("forward_backward")
    before = names["result"]
    assert list(before["result"]) == ["loss_fn_outputs", "metrics"]
    assert len(before["result"]["loss_fn_outputs"]) == 2
    run("optim_step")
    again = names["training_client"].forward_backward(names["datums"], loss_fn="cross_entropy", wait=True)
    assert again["result"]["metrics"]["loss"] < before["result"]["metrics"]["loss"]
    run("adam")
    assert names["training_client"].optim_step(names["adam_params"], wait=True)["result"]["metrics"]["step"] == 2

    run("sampling client")
    named = names["sampling_client"]
    todo["saved weights"] = todo["saved weights"].replace("/path/to/weights", named.model_path)
    run("saved weights")
    prompt = types.ModelInput.from_ints(tokens)
    assert list(names["sampling_client"].compute_logprobs(prompt)) == list(named.compute_logprobs(prompt))
    assert not todo, "blocks that have not run"
    names["service_client"].close()


LOOPS = """
from nat_plugin_evsys.types import (
    Datum, ModelInput, ModelInputChunk, EncodedTextChunk, ImageChunk, TensorData,
    SamplingParams, AdamParams, WandbConfig,
    SampleResult, SampledSequence, Checkpoint, CheckpointFilesResponse, CheckpointFile,
    ServerCapabilities, SupportedModel,
    OperationFuture, ForwardBackwardFuture, ForwardBackwardOutput, OptimStepResponse, SaveWeightsResponse,
    SaveWeightsForSamplerResponse, LoadWeightsResponse, InitTrainerServerResponse, SampleResponse,
)
from nat_plugin_evsys import ServiceClient, TrainingClient, SamplingClient
"""
"""Every name of the page on Loops' types, which has no code of its own."""


def test_loops_types_are_what_the_calls_give(tmp_path: Path, tiny_model: str) -> None:
    loops: dict[str, Any] = {}
    exec(LOOPS, loops)
    is_a = {name: kind for name, kind in loops.items() if not name.startswith("_")}
    datum = is_a["Datum"](
        is_a["ModelInput"](chunks=[is_a["EncodedTextChunk"](tokens=[1, 2, 3])]),
        {"target_tokens": is_a["TensorData"].from_torch(torch.tensor([2, 3, 4]))},
    )
    assert datum.loss_fn_inputs["target_tokens"].to_torch().tolist() == [2, 3, 4]
    with is_a["ServiceClient"](store=tmp_path) as service:
        found = service.get_server_capabilities()
        assert isinstance(found, is_a["ServerCapabilities"])
        assert all(isinstance(model, is_a["SupportedModel"]) for model in found.supported_models)
        client = service.create_lora_training_client(tiny_model, rank=2).result(timeout=60)
        assert isinstance(client, is_a["TrainingClient"])
        assert isinstance(client.get_info(), is_a["InitTrainerServerResponse"])
        future = client.forward_backward([datum], "cross_entropy")
        assert isinstance(future, is_a["ForwardBackwardFuture"])
        assert isinstance(future, is_a["OperationFuture"])
        assert isinstance(future.result(timeout=60), is_a["ForwardBackwardOutput"])
        adam = is_a["AdamParams"](
            learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.01, grad_clip_norm=1.0
        )
        assert isinstance(client.optim_step(adam).result(), is_a["OptimStepResponse"])
        saved = client.save_state("state").result()
        assert isinstance(saved, is_a["SaveWeightsResponse"])
        assert isinstance(client.save_weights_for_sampler("s").result(), is_a["SaveWeightsForSamplerResponse"])
        assert isinstance(client.load_state(saved.path).result(), is_a["LoadWeightsResponse"])
        checkpoints = service.list_checkpoints()
        assert all(isinstance(checkpoint, is_a["Checkpoint"]) for checkpoint in checkpoints)
        files = service.get_checkpoint_archive_url(checkpoints[0])
        assert isinstance(files, is_a["CheckpointFilesResponse"])
        assert all(isinstance(file, is_a["CheckpointFile"]) for file in files.presigned_urls)
        sampling = client.save_weights_and_get_sampling_client()
        assert isinstance(sampling.result(timeout=60), is_a["SamplingClient"])
        params = is_a["SamplingParams"](temperature=0.0, top_p=1.0, top_k=0, max_tokens=3, seed=1, stop=[])
        prompt = is_a["ModelInput"].from_ints([1, 2, 3])
        result = sampling.sample(prompt, 1, params, include_prompt_logprobs=True, topk_prompt_logprobs=2).result()
        assert isinstance(result, is_a["SampleResult"])
        assert isinstance(result, is_a["SampleResponse"])
        assert isinstance(result.sequences[0], is_a["SampledSequence"])
        assert (result.policy_version, len(result.prompt_logprobs), len(result.topk_prompt_logprobs[2])) == (1, 3, 2)
