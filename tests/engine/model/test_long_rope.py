"""LongRoPE: each sequence has the rotary table of its own length, against transformers on that sequence alone."""

from __future__ import annotations

import pytest
import torch
from families import save_tiny_family
from tinker import types
from tiny import perturb
from transformers import AutoModelForCausalLM, PreTrainedModel

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampler import Sampler

LIMIT = 32
LENGTHS = (5, 31, 32, 33, 60)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, PreTrainedModel]:
    """The engine's model, and transformers' own."""
    path = save_tiny_family("phi3_longrope", tmp_path_factory.mktemp("longrope"))
    return load_base_model(str(path), device="cpu"), AutoModelForCausalLM.from_pretrained(path).eval()


def tokens_of(length: int) -> list[int]:
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def alone(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of one sequence."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_long_and_short_datums_are_not_mixed(path: str, models: tuple[BaseModel, PreTrainedModel]) -> None:
    base, reference = models
    adapter = LoraAdapter.create(base.model, rank=2, alpha=4.0)
    data = []
    for length in LENGTHS:
        tokens = tokens_of(length + 1)
        weights = [0.0] * length
        weights[min(length - 1, 10)] = 1.0  # what is read of a long Datum may end before the limit
        data.append(
            types.Datum(types.ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": weights})
        )
    for lean in (False, True):
        model = TrainableModel(base, adapter, path=path, untrained_logprobs=not lean)  # type: ignore[arg-type]
        output = model.forward_backward(data, "cross_entropy")
        assert (output.metrics["plain_path_tokens:sum"] == 0) == (path == "auto")
        for length, out in zip(LENGTHS, output.loss_fn_outputs, strict=True):
            tokens = tokens_of(length + 1)
            wanted = alone(reference, tokens[:-1]).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            found = out["logprobs"].to_torch()
            rows = [min(length - 1, 10)] if lean else list(range(length))
            torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-4, atol=1e-4)


def test_a_rollout_over_the_limit_reads_its_context_again(models: tuple[BaseModel, PreTrainedModel]) -> None:
    base, reference = models
    adapter = perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0))
    merged = {
        name: reference.get_parameter(f"{name}.weight") + adapter.scale * (b @ a).detach()
        for name, (a, b) in adapter.weights.items()
    }
    for name, weight in merged.items():
        reference.get_submodule(name).weight = torch.nn.Parameter(weight)
    sampler = Sampler(base)
    assert f"changes at {LIMIT} tokens" in sampler.plain_because
    sampler._runner.prefill_tokens = 20  # a piece of a long prompt ends before the limit
    params = types.SamplingParams(max_tokens=9, seed=5, stop=[])
    prompts = [tokens_of(n) for n in (3, 27, 32, 50)]
    client = sampler.client(adapter, 0)
    try:
        for _ in range(2):  # the second time from kept prefixes
            asked = [client.sample(types.ModelInput.from_ints(p), 2, params) for p in prompts]
            for prompt, future in zip(prompts, asked, strict=True):
                for sequence in future.result(60).sequences:
                    for n, logprob in enumerate(sequence.logprobs or []):
                        before = [*prompt, *sequence.tokens[:n]]
                        wanted = float(alone(reference, before)[-1, sequence.tokens[n]])
                        assert logprob == pytest.approx(wanted, abs=1e-4)
        for prompt in prompts:
            scored = client.compute_logprobs(types.ModelInput.from_ints(prompt)).result(60)
            lp = alone(reference, prompt)
            assert scored[1:] == pytest.approx([float(lp[i, t]) for i, t in enumerate(prompt[1:])], abs=1e-4)
    finally:
        sampler.close()
