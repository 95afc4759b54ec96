"""Images over the unmodified SDK: the server trains on them and samples from them as the engine in process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from serve_process import start_server
from tinker import types
from tiny_vision import END_ID, START_ID, chunk_of, picture, save_vision_model, text

from nat_plugin_evsys import ServiceClient

PARTS = ([5, START_ID], [END_ID, 7, 8, 9])
IMAGE_TOKENS = 4


def prompt(seed: int) -> types.ModelInput:
    return types.ModelInput(chunks=[text(*PARTS[0]), chunk_of(picture(seed), "jpeg"), text(*PARTS[1])])


def datum(seed: int) -> types.Datum:
    count = sum(map(len, PARTS)) + IMAGE_TOKENS
    inputs: dict[str, Any] = {"target_tokens": torch.arange(count), "weights": torch.ones(count)}
    return types.Datum(prompt(seed), {name: types.TensorData.from_torch(value) for name, value in inputs.items()})


def trained_and_sampled(service: Any, model: str) -> tuple[list[torch.Tensor], list[Any]]:
    """Logprobs of two passes with a step between them, and what is then sampled for two images."""
    training = service.create_lora_training_client(base_model=model, rank=4, seed=3).result()
    data = [datum(1), datum(2)]
    outputs = training.forward_backward(data, "cross_entropy").result().loss_fn_outputs
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    outputs += training.forward(data, "cross_entropy").result().loss_fn_outputs
    client = training.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    futures = [client.sample(prompt(seed), 1, params, include_prompt_logprobs=True) for seed in (1, 2)]
    return [output["logprobs"].to_torch() for output in outputs], [future.result() for future in futures]


def test_server_and_engine_agree(tmp_path: Path) -> None:
    model = save_vision_model("gemma3", tmp_path / "models" / "gemma3")
    server = start_server(model, tmp_path / "store", "--poll-seconds", "3")
    try:
        with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as remote:
            theirs, their_samples = trained_and_sampled(remote, str(model))
            bare = remote.create_sampling_client(base_model=str(model)).result()
            torn = types.ModelInput(
                chunks=[types.ImageChunk(data=b"no image", format="png", expected_tokens=4), text(1)]
            )
            with pytest.raises(tinker.TinkerError, match="the prompt has an image that cannot be read as png"):
                bare.sample(torn, 1, types.SamplingParams(max_tokens=1)).result()
    finally:
        server.stop()
    with ServiceClient(store=tmp_path / "here", device="cpu") as here:
        ours, our_samples = trained_and_sampled(here, str(model))
    for one, other in zip(theirs, ours, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert (theirs[0] - theirs[2]).abs().max() > 1e-3
    for theirs_of, ours_of in zip(their_samples, our_samples, strict=True):
        assert theirs_of.sequences[0].tokens == ours_of.sequences[0].tokens
        torch.testing.assert_close(
            torch.tensor(theirs_of.prompt_logprobs[1:]), torch.tensor(ours_of.prompt_logprobs[1:]), atol=1e-5, rtol=0
        )
    assert their_samples[0].prompt_logprobs != their_samples[1].prompt_logprobs
