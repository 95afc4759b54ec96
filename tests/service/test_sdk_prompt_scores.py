"""``target_prompt_logprobs`` and ``prompt_alt_tokens_k`` over the SDK: the server gives what the engine gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinker
import torch
from serve_process import ServerProcess

from nat_plugin_evsys import ServiceClient
from nat_plugin_evsys.engine.sampling.prompt_scores import MOST_CELLS

PROMPT = tinker.ModelInput.from_ints(list(b"Hello, world"))
ROWS = PROMPT.length - 1


@pytest.mark.parametrize("sparse", [False, True])
def test_they_are_those_of_the_engine_in_process(
    open_server: ServerProcess, served_model: Path, tmp_path: Path, sparse: bool
) -> None:
    ids = torch.full((ROWS, 2), -1)
    ids[-1], ids[2, 0] = torch.tensor([5, 6]), 77
    targets = tinker.TensorData.from_torch_sparse(ids, pad_value=-1) if sparse else tinker.TensorData.from_torch(ids)
    params = tinker.SamplingParams(max_tokens=1, seed=3)
    with (
        tinker.ServiceClient(base_url=open_server.url, api_key="tml-local") as remote,
        ServiceClient(store=tmp_path, device="cpu") as here,
    ):
        answers = [
            service.create_sampling_client(base_model=str(served_model))
            .result()
            .sample(PROMPT, 1, params, target_prompt_logprobs=targets, prompt_alt_tokens_k=3)
            .result()
            for service in (remote, here)
        ]
        client = remote.create_sampling_client(base_model=str(served_model)).result()
        short = client.sample(PROMPT, 1, params, target_prompt_logprobs=tinker.TensorData.from_torch(ids[1:]))
        with pytest.raises(tinker.TinkerError, match="one row for each token but the first"):
            short.result()
        many = client.sample(PROMPT, 1, params, prompt_alt_tokens_k=2**30)
        with pytest.raises(tinker.TinkerError, match=f"at most {MOST_CELLS} are given at once"):
            many.result()
    theirs, ours = (answer.target_prompt_logprobs.to_torch() for answer in answers)
    assert theirs.shape == (ROWS, 2)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert bool((theirs[ids == -1] == 0).all())
    assert bool((theirs[ids != -1] < 0).all())
    drawn = [answer.prompt_alt_tokens for answer in answers]
    assert [draws.tokens.to_torch().shape for draws in drawn] == [(ROWS, 3)] * 2
    assert drawn[0].tokens.tolist() == drawn[1].tokens.tolist()
    torch.testing.assert_close(drawn[0].logprobs.to_torch(), drawn[1].logprobs.to_torch(), atol=1e-5, rtol=0)
