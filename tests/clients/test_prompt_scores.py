"""``target_prompt_logprobs`` and ``prompt_alt_tokens_k`` against one plain forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nat_plugin_evsys import SamplingClient, TrainingClient, types
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.errors import DataError

PROMPT = list(range(40, 52))
ONE = types.SamplingParams(max_tokens=1, seed=7)


@pytest.fixture
def sampling(client: TrainingClient, train: Any) -> SamplingClient:
    train(client, 0, 3)
    return client.save_weights_and_get_sampling_client().result()


def plain_logprobs(sampling: SamplingClient) -> torch.Tensor:
    """(P - 1, V): row i predicts prompt position i + 1."""
    with torch.no_grad(), applied(sampling._engine.adapter):
        logits = sampling._base.model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(-1)


def targets() -> torch.Tensor:
    """Few ids in some rows, none in others."""
    ids = torch.full((len(PROMPT) - 1, 3), -1, dtype=torch.int64)
    ids[0, 0], ids[4, 1], ids[4, 2], ids[-1] = 7, 0, 199, torch.tensor([1, 2, 3])
    return ids


@pytest.mark.parametrize("sparse", [False, True])
def test_chosen_ids_are_scored_in_the_layout_of_the_request(sampling: SamplingClient, sparse: bool) -> None:
    ids = targets()
    given = types.TensorData.from_torch_sparse(ids, pad_value=-1) if sparse else types.TensorData.from_torch(ids)
    assert (given.sparse_crow_indices is not None) is sparse
    # Beside a request of another length, in one batch: the shorter one is padded.
    longer = sampling.sample([*PROMPT, 9, 9, 9], 1, ONE, include_prompt_logprobs=True)
    result = sampling.sample(PROMPT, 1, ONE, target_prompt_logprobs=given).result()
    longer.result()
    found = result.target_prompt_logprobs
    assert found is not None
    assert (found.dtype, found.shape, found.sparse_crow_indices) == ("float32", [11, 3], given.sparse_crow_indices)
    expected = plain_logprobs(sampling).gather(1, ids.clamp(min=0)).masked_fill(ids == -1, 0.0)
    torch.testing.assert_close(found.to_torch(), expected, atol=1e-4, rtol=0)
    assert result.prompt_logprobs is None
    assert result.prompt_alt_tokens is None


def test_draws_come_from_the_distribution_at_each_position(sampling: SamplingClient) -> None:
    k = 2000
    result = sampling.sample(PROMPT, 1, ONE, prompt_alt_tokens_k=k).result()
    assert result.prompt_alt_tokens is not None
    tokens, logprobs = (t.to_torch() for t in (result.prompt_alt_tokens.tokens, result.prompt_alt_tokens.logprobs))
    assert tokens.shape == logprobs.shape == (11, k)
    expected = plain_logprobs(sampling)
    torch.testing.assert_close(logprobs, expected.gather(1, tokens), atol=1e-4, rtol=0)
    shares = torch.stack([row.bincount(minlength=expected.shape[1]) / k for row in tokens])
    # The total variation distance of 2000 draws from a few hundred tokens is about sqrt(V / (2 pi k)).
    assert float((shares - expected.exp()).abs().sum(dim=1).max() / 2) < 0.3
    again = sampling.sample(PROMPT, 1, ONE, prompt_alt_tokens_k=k).result()
    assert again.prompt_alt_tokens is not None
    assert again.prompt_alt_tokens.tokens.tolist() == result.prompt_alt_tokens.tokens.tolist()


def test_draws_at_temperature_0_are_the_likeliest_token(sampling: SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=1, temperature=0.0)
    result = sampling.sample(PROMPT, 1, params, prompt_alt_tokens_k=2).result()
    assert result.prompt_alt_tokens is not None
    expected = plain_logprobs(sampling).max(dim=1).values
    found = result.prompt_alt_tokens.logprobs.to_torch()
    torch.testing.assert_close(found, expected[:, None].expand(-1, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (types.TensorData.from_torch(torch.zeros(11, 2)), "must be int64 of shape"),
        (types.TensorData.from_torch(torch.zeros(10, 2, dtype=torch.int64)), r"shape \[11, K\].*\[10, 2\]"),
        (types.TensorData.from_torch(torch.full((11, 2), -1)), "names no id"),
        (types.TensorData.from_torch(torch.full((11, 2), 10**6)), "has an id outside"),
        (types.TensorData.from_torch(torch.full((11, 2), -2)), "has an id outside"),
        ("ids", "is a str; give types.TensorData"),
        (types.TensorData([1], "int64", [11, 2**30], [0] * 11 + [1], [5]), "11 times 1073741824 logprobs; at most"),
        (types.TensorData([1], "int64", [11, 2], [0] * 11 + [1], [7]), "target_prompt_logprobs is malformed"),
    ],
)
def test_malformed_targets_are_refused(sampling: SamplingClient, given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sampling.sample(PROMPT, 1, ONE, target_prompt_logprobs=given).result()
