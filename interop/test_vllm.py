"""Acceptance: a real vLLM samples what the engine trains on SmolLM2, in float32 on the CPU. ``VLLM`` is its program."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from nat_process import ROOT, json_lines, newest_run, run_nat
from tinker import types

from nat_plugin_evsys.backends.base import SamplingClient
from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.backends.sampling_params import SamplingParams
from nat_plugin_evsys.backends.vllm.rollouts import model_for_vllm
from nat_plugin_evsys.backends.vllm.server import VllmServer, serving_arguments
from nat_plugin_evsys.config.policy import EvsysPolicyConfig
from nat_plugin_evsys.policy.weights import create_backend

MODEL = "builtin/smollm2-135m"
ARGS = ["--enforce-eager", "--gpu-memory-utilization=0.1"]  # on the CPU, a share of the whole machine's memory
QUESTION = "A list of what to do when the printer does not print:"
ROWS = 8

pytestmark = pytest.mark.skipif("VLLM" not in os.environ, reason="make test-vllm")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    sizes = {"rank": 8, "context_length": 1024, "sequences": 16}
    arguments = serving_arguments(model_for_vllm(MODEL), dtype="float32", on_cpu=True, **sizes)
    started = VllmServer(os.environ["VLLM"], [*arguments, *ARGS], log)
    started.wait(900)
    yield started
    started.close()


@pytest.fixture
async def backend(server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LocalBackend]:
    """A perturbed adapter, since an untrained one would leave any loading unproven."""
    monkeypatch.setenv("VLLM_API_KEY", server.key)
    config = EvsysPolicyConfig.model_validate(
        {
            "base_model": MODEL,
            "output_dir": tmp_path,
            "lora_rank": 8,
            "context_length": 1024,
            "rollout_engine": "vllm",
            "vllm": {"base_url": server.url},
        }
    )
    opened = await create_backend(config, train=True, rollouts=True)
    assert isinstance(opened, LocalBackend)
    perturb(opened, 1)
    yield opened
    await opened.close()


def perturb(backend: LocalBackend, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in backend._model.adapter.named_tensors():
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)


async def greedy(client: SamplingClient, ids: list[int], count: int = 24) -> list[int]:
    response = await client.sample_async(
        types.ModelInput.from_ints(ids), 1, types.SamplingParams(max_tokens=count, temperature=0.0)
    )
    return list(response.sequences[0].tokens)


@pytest.mark.timeout(1800)
async def test_each_version_is_sampled_with_its_own_adapter(backend: LocalBackend) -> None:
    ids = backend.get_tokenizer().encode(QUESTION)
    first = await backend.snapshot_sampling_client()
    perturb(backend, 2)
    second = await backend.snapshot_sampling_client()
    rollouts, backend.rollouts = backend.rollouts, None
    embedded = await backend.snapshot_sampling_client()
    backend.rollouts = rollouts
    replies = [await greedy(client, ids) for client in (first, second, embedded)]
    assert replies[1] == replies[2]
    assert replies[0] != replies[1], "both adapters were one, or neither was used"
    params = types.SamplingParams(max_tokens=30, seed=3)
    response = await second.sample_async(types.ModelInput.from_ints(ids), 4, params)
    for sequence in response.sequences:
        learned = await embedded.compute_logprobs_async(types.ModelInput.from_ints(ids + list(sequence.tokens)))
        assert sequence.logprobs == pytest.approx(learned[len(ids) :], abs=2e-3)
    figures = backend.take_rollout_figures()
    print(json.dumps(figures))
    assert figures["vllm_requests:sum"] == 3
    assert figures["rollout_kl:max"] < 1e-6
    assert figures["rollout_logprob_gap:max"] < 1e-2


@pytest.mark.timeout(1800)
async def test_what_vllm_would_record_otherwise_is_sampled_embedded_and_counted(backend: LocalBackend) -> None:
    ids = backend.get_tokenizer().encode(QUESTION)
    client = await backend.snapshot_sampling_client()
    prompt = types.ModelInput.from_ints(ids)
    for params in (SamplingParams(max_tokens=4, min_tokens=2), SamplingParams(max_tokens=4, stop=["\n"])):
        await client.sample_async(prompt, 1, params)
    figures = backend.take_rollout_figures()
    assert (figures["vllm_requests:sum"], figures["embedded_requests:sum"]) == (1, 1)


@pytest.mark.timeout(1800)
async def test_too_much_drift_falls_back_by_name(backend: LocalBackend, caplog: pytest.LogCaptureFixture) -> None:
    """The learner's base model is another one than vLLM's: its output head is scaled."""
    head = backend.base.model.get_output_embeddings().weight
    ids = backend.get_tokenizer().encode(QUESTION)
    with torch.no_grad():
        head *= 1.5
    with caplog.at_level(logging.WARNING):
        client = await backend.snapshot_sampling_client()
    assert "sampled by the embedded engine: vLLM computes something else than the learner, KL" in caplog.text
    await greedy(client, ids, 2)
    figures = backend.take_rollout_figures()
    assert figures["rollout_versions_refused:sum"] == 1
    assert figures["rollout_kl:max"] > 0.015
    assert figures["vllm_requests:sum"] == 0


@pytest.mark.timeout(3600)
def test_a_run_whose_rollouts_vllm_samples(tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "configs/quickstart.yml").read_text())
    rows = json.loads((ROOT / config["eval"]["general"]["dataset"]["file_path"]).read_text())[:ROWS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config["eval"]["general"]["dataset"]["file_path"] = str(tmp_path / "rows.json")
    config["eval"]["general"]["output_dir"] = str(tmp_path / "eval")
    config["llms"]["policy"] |= {
        "output_dir": str(tmp_path / "runs"),
        "context_length": 1024,
        "rollout_engine": "vllm",
        "vllm": {"command": os.environ["VLLM"], "args": ARGS},
    }
    config["finetuning"] |= {"output_dir": str(tmp_path / "runs"), "num_epochs": 2}
    config["trainer_adapters"]["adapter"]["recompute_logprobs"] = False
    trainer = config["trainers"]["trainer"]
    trainer["warm_start"]["demonstrations"] = str(ROOT / trainer["warm_start"]["demonstrations"])
    del trainer["validation_dataset"], trainer["validation_interval"]
    path = tmp_path / "vllm.yml"
    path.write_text(yaml.safe_dump(config))

    done = run_nat("finetune", "--config_file", str(path), timeout=3500)
    assert done.code == 0, done.text[-4000:]
    epochs = [row for row in json_lines(newest_run(tmp_path) / "metrics.jsonl") if "job" in row]
    assert len(epochs) == 2
    names = ("rollout_kl:max", "rollout_logprob_gap:max", "vllm_requests:sum", "embedded_requests:sum", "ratio:mean")
    for row in epochs:
        print(row.get("reward_mean"), {name: row["job"]["metrics"].get(name) for name in names})
    for row in epochs:
        figures = row["job"]["metrics"]
        assert figures["vllm_requests:sum"] >= ROWS * 8
        assert figures["embedded_requests:sum"] == 0
        assert figures["rollout_kl:max"] < 1e-6
        assert abs(figures["ratio:mean"] - 1) < 0.1
