"""What the loops of evsys-sdk ask of a backend: its SFT, SDFT and RL steps, call by call, on LocalBackend.

The loop submits forward_backward and the optimizer step, then waits for ``result_async()`` of each; it saves the full
state and the sampler's weights under one name; what samples gets keyword arguments alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tinker import types

from nat_plugin_evsys.backends.base import Backend, SamplingClient
from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.engine.checkpoints import read_checkpoint
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.testing import ScriptedSamplingClient

ADAM = types.AdamParams(learning_rate=1e-2)
PROMPT = types.ModelInput.from_ints(list(b"Q: 2+2 A:"))
REPLY = list(b" four.")
WANTED = range(64)
"""Byte tokens that are rewarded."""

Loss = str | Callable[[Any, Any], Any]


async def step(backend: Backend, data: list[types.Datum], loss_fn: Any) -> types.ForwardBackwardOutput:
    """One step of evsys's training loop: a name is a loss of the engine, a function one of the client."""
    if callable(loss_fn):
        forward_backward = backend.forward_backward_custom_async(data, loss_fn)
    else:
        forward_backward = backend.forward_backward_async(data, loss_fn=loss_fn, loss_fn_config=None)
    optim_step = backend.optim_step_async(ADAM)
    output = await forward_backward.result_async()
    assert (await optim_step.result_async()).metrics["grad_norm"] > 0
    return output


async def checkpoint(backend: Backend, name: str) -> tuple[str, str]:
    """(state, sampler) as its checkpoint manager records them: one name, two URIs."""
    return await backend.save_full_state(name), await backend.save_for_sampler(name)


def tensors(**inputs: torch.Tensor) -> dict[str, Any]:
    return {name: types.TensorData.from_torch(tensor) for name, tensor in inputs.items()}


def completion(prompt: types.ModelInput, reply: list[int]) -> tuple[types.ModelInput, torch.Tensor, torch.Tensor]:
    """(model input, targets, 1 where the target is of the reply), shifted by one."""
    tokens = [*prompt.to_ints(), *reply]
    mask = torch.zeros(len(tokens) - 1)
    mask[prompt.length - 1 :] = 1.0
    return types.ModelInput.from_ints(tokens[:-1]), torch.tensor(tokens[1:]), mask


async def test_sft_with_checkpoints_evaluation_and_resume(make_backend: Any, tmp_path: Path) -> None:
    backend: LocalBackend = await make_backend(seed=1)
    inputs, targets, mask = completion(PROMPT, REPLY)
    data = [types.Datum(inputs, tensors(target_tokens=targets, weights=mask))]
    nll = []
    for _ in range(40):
        output = await step(backend, data, "cross_entropy")
        logprobs = output.loss_fn_outputs[0]["logprobs"].to_torch()
        nll.append(-float((logprobs * mask).sum() / mask.sum()))
    assert nll[-1] < 0.2 * nll[0]

    state, sampler = await checkpoint(backend, "final")
    assert state != sampler
    assert [read_checkpoint(uri).kind for uri in (state, sampler)] == ["training", "sampler"]
    evaluated = await backend.snapshot_sampling_client("eval-40")
    greedy = types.SamplingParams(max_tokens=len(REPLY), temperature=0.0)
    sampled = await evaluated.sample_async(prompt=PROMPT, params=greedy)
    assert [list(sequence.tokens) for sequence in sampled.sequences] == [REPLY]

    resumed: LocalBackend = await make_backend(seed=2, checkpoint_dir=tmp_path / "resumed")
    await resumed.load_state(state, with_optimizer=True)
    losses = [(await step(one, data, "cross_entropy")).metrics["loss:sum"] for one in (backend, resumed)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def reverse_kl(data: list[types.Datum], logprobs: list[torch.Tensor]) -> torch.Tensor:
    """KL(student || teacher) over the teacher's likeliest tokens, (N, K) each; a bare scalar."""
    total = torch.zeros(())
    for datum, student in zip(data, logprobs, strict=True):
        teacher = datum.loss_fn_inputs["weights"].to_torch()
        rows = (teacher > 0).all(dim=-1)
        student = student[rows].log_softmax(dim=-1)
        total = total + (student.exp() * (student - teacher[rows].log())).sum()
    return total


@pytest.mark.parametrize("loss_fn", ["cross_entropy", reverse_kl])
async def test_sdft_distils_the_likeliest_tokens_of_a_demonstrated_teacher(make_backend: Any, loss_fn: Loss) -> None:
    top = 8
    backend: LocalBackend = await make_backend(seed=1)
    teacher = await backend.snapshot_sampling_client("teacher")
    shown = types.ModelInput.from_ints(list(b"For instance: four. ") + PROMPT.to_ints())
    student = await backend.snapshot_sampling_client("student")
    params = types.SamplingParams(max_tokens=12, temperature=1.0, seed=3, stop=[])
    data = []
    for sequence in (await student.sample_async(prompt=PROMPT, params=params, num_samples=4)).sequences:
        reply = list(sequence.tokens)
        scored = await teacher.sample_async(
            prompt=types.ModelInput.from_ints([*shown.to_ints(), *reply]),
            params=types.SamplingParams(max_tokens=1),
            num_samples=1,
            include_prompt_logprobs=True,
            topk_prompt_logprobs=top,
        )
        assert scored.topk_prompt_logprobs is not None
        inputs, targets, mask = completion(PROMPT, reply)
        tokens = torch.zeros(len(targets), top, dtype=torch.int64)
        weights = torch.zeros(len(targets), top)
        for row, position in enumerate(mask.nonzero()[:, 0].tolist()):
            likeliest = scored.topk_prompt_logprobs[shown.length + row]
            assert likeliest is not None
            tokens[position] = torch.tensor([token for token, _ in likeliest])
            weights[position] = torch.tensor([logprob for _, logprob in likeliest]).softmax(dim=0)
        data.append(types.Datum(inputs, tensors(target_tokens=tokens, weights=weights)))

    async def divergence() -> float:
        output = await backend.forward_async(data, loss_fn="cross_entropy")
        return float(reverse_kl(data, [out["logprobs"].to_torch() for out in output.loss_fn_outputs]))

    before = await divergence()
    for _ in range(15):
        await step(backend, data, loss_fn)
    assert await divergence() < 0.5 * before


async def test_rl_with_datums_that_carry_a_mask(make_backend: Any) -> None:
    """Group-normalised advantages over sampled replies; wanted tokens become likelier."""
    backend: LocalBackend = await make_backend(seed=1)
    rates = []
    for number in range(20):
        await backend.save_for_sampler(f"rl_snap_{number}")
        sampler = await backend.snapshot_sampling_client()
        params = types.SamplingParams(max_tokens=8, temperature=1.0, seed=number, stop=[])
        sampled = await sampler.sample_async(prompt=PROMPT, params=params, num_samples=32)
        rewards = torch.tensor([float(sum(token in WANTED for token in s.tokens)) for s in sampled.sequences])
        rates.append(float(rewards.mean()) / 8)
        data = []
        for sequence, advantage in zip(sampled.sequences, (rewards - rewards.mean()).tolist(), strict=True):
            inputs, targets, mask = completion(PROMPT, list(sequence.tokens))
            logprobs = torch.zeros(len(targets))
            logprobs[mask == 1] = torch.tensor(sequence.logprobs)
            given = tensors(target_tokens=targets, mask=mask, logprobs=logprobs, advantages=mask * advantage)
            data.append(types.Datum(inputs, given))
        await step(backend, data, "importance_sampling")
    assert sum(rates[-4:]) / 4 > sum(rates[:4]) / 4 + 0.1


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo"])
async def test_a_mask_keeps_tokens_out_of_the_loss(make_backend: Any, loss_fn: Any) -> None:
    backend: LocalBackend = await make_backend(seed=1)
    inputs, targets, _ = completion(PROMPT, REPLY)
    size = len(targets)
    mask = (torch.arange(size) % 3 == 0).float()
    given = {"target_tokens": targets, "logprobs": torch.full((size,), -5.0)}
    advantages = torch.linspace(-1, 1, size)
    masked = types.Datum(inputs, tensors(**given, advantages=advantages, mask=mask))
    zeroed = types.Datum(inputs, tensors(**given, advantages=advantages * mask))
    found = [await backend.forward_async([datum], loss_fn=loss_fn) for datum in (masked, zeroed)]
    assert found[0].metrics == found[1].metrics
    negative = types.Datum(inputs, tensors(**given, advantages=advantages, mask=mask - 1))
    with pytest.raises(DataError, match=r"data\[0\]: mask\[1\] is -1.0; give 1 for a token that counts"):
        await backend.forward_async([negative], loss_fn=loss_fn)


async def test_what_is_no_loss_is_refused(make_backend: Any, make_datums: Any) -> None:
    backend: LocalBackend = await make_backend()
    with pytest.raises(DataError, match="the custom loss returned a float"):
        await backend.forward_backward_custom_async(make_datums(0), lambda data, logprobs: 1.0)  # type: ignore[arg-type,return-value]
    with pytest.raises(DataError, match="loss_fn is a str"):
        backend.forward_backward_custom_async(make_datums(0), "mean")  # type: ignore[arg-type]


async def test_the_parameters_go_by_either_name(make_backend: Any) -> None:
    client = await (await make_backend()).snapshot_sampling_client()
    params = types.SamplingParams(max_tokens=3, temperature=0.0)
    found = [
        await client.sample_async(PROMPT, 1, params),
        await client.sample_async(prompt=PROMPT, params=params, num_samples=1),
    ]
    assert found[0].sequences[0].tokens == found[1].sequences[0].tokens
    with pytest.raises(DataError, match="two names of the same parameters"):
        await client.sample_async(PROMPT, 1, params, params=params)
    with pytest.raises(DataError, match="sampling_params is a NoneType"):
        await client.sample_async(PROMPT)


SIGNATURES = {
    "forward_backward_async": "(self, data, *, loss_fn, loss_fn_config=None)",
    "forward_backward_custom_async": "(self, data, loss_fn)",
    "optim_step_async": "(self, adam)",
    "save_for_sampler": "(self, name)",
    "save_full_state": "(self, name)",
    "snapshot_sampling_client": "(self, name=None)",
    "get_tokenizer": "(self)",
}
"""As evsys-sdk's page on ``Backend`` has them."""


@pytest.mark.parametrize(("name", "written"), SIGNATURES.items())
def test_the_signatures_are_those_of_the_page(name: str, written: str) -> None:
    signature = inspect.signature(getattr(Backend, name))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == written


def test_every_sampling_client_can_be_called_as_evsys_does() -> None:
    from nat_plugin_evsys import SamplingClient as TinkersSamplingClient
    from nat_plugin_evsys.backends.remote.sampling import TinkerSamplingClient
    from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient

    asked = {"prompt": PROMPT, "params": None, "num_samples": 1, "include_prompt_logprobs": True}
    clients = (LocalSamplingClient, TinkerSamplingClient, TinkersSamplingClient, ScriptedSamplingClient)
    for kind in (SamplingClient, *clients):
        inspect.signature(kind.sample_async).bind(None, **asked, topk_prompt_logprobs=2)
