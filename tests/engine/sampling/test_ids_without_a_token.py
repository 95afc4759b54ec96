"""Ids of a padded head that the tokenizer does not have are never sampled, and the logprobs stay the policy's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tinker.types import ModelInput
from tiny import tiny_model

from nat_plugin_evsys.engine.model.loading import BaseModel, wrap_model
from nat_plugin_evsys.engine.sampling.stopping import ids_without_a_token
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.runtime.extensions import SamplingParams

TIMEOUT = 60
PROMPT = [5, 6, 7, 8]
SEED, PADDING = 7, 60


@pytest.fixture(scope="module")
def padded(tokenizer: Any) -> BaseModel:
    """A model with a fifth more ids than its tokenizer has, which it finds likelier than the others."""
    model = tiny_model("qwen3", seed=SEED, vocab_size=len(tokenizer) + PADDING)
    with torch.no_grad():
        model.lm_head.weight[len(tokenizer) :] *= 4
    return wrap_model("padded", model, tokenizer)


@pytest.mark.parametrize("path", ["auto", "plain"])
def test_they_are_never_sampled(
    padded: BaseModel, make_sampler: Callable[..., Any], plain_logits: Callable[..., torch.Tensor], path: str
) -> None:
    known = padded.vocab_size - PADDING
    client = make_sampler(padded, path=path).client(None, 0)
    for params, rows in (
        (SamplingParams(max_tokens=40, temperature=1.5, seed=1, stop=[]), 4),
        (SamplingParams(max_tokens=40, temperature=0, stop=[]), 1),
        (SamplingParams(max_tokens=40, temperature=1.5, top_k=3, seed=1, stop=[]), 4),
    ):
        for sequence in client.sample(ModelInput.from_ints(PROMPT), rows, params).result(TIMEOUT).sequences:
            assert max(sequence.tokens) < known
            z = plain_logits(padded, None, [*PROMPT, *sequence.tokens])[len(PROMPT) - 1 : -1]
            assert (z.argmax(-1) >= known).any()  # they would be sampled
            if params.top_k == 3:
                z[:, known:] = float("-inf")
                z = z.masked_fill(z < z.topk(3).values[:, -1:], float("-inf"))
            own = (z / (params.temperature or 1.0)).log_softmax(-1)
            expected = own.gather(1, torch.tensor(sequence.tokens)[:, None]).squeeze(1)
            assert torch.allclose(torch.tensor(sequence.logprobs), expected, atol=1e-4)
            if params.temperature == 0:
                assert sequence.tokens == z[:, :known].argmax(-1).tolist()


def test_they_are_not_drawn_at_prompt_positions_either(padded: BaseModel, make_sampler: Callable[..., Any]) -> None:
    client = make_sampler(padded).client(None, 0)
    for temperature in (0, 1.5):
        params = SamplingParams(max_tokens=1, temperature=temperature, seed=1)
        prompt = ModelInput.from_ints(PROMPT * 10)
        found = client.sample(prompt, 1, params, prompt_alt_tokens_k=8).result(TIMEOUT).prompt_alt_tokens
        assert found.tokens.to_torch().max() < padded.vocab_size - PADDING


def test_where_no_other_is_left_the_request_is_refused(padded: BaseModel, make_sampler: Callable[..., Any]) -> None:
    bans = dict.fromkeys(range(padded.vocab_size - PADDING), -100.0)
    params = SamplingParams(max_tokens=2, logit_bias=bans)
    with pytest.raises(DataError, match="bans every token"):
        make_sampler(padded).client(None, 0).sample(ModelInput.from_ints(PROMPT), 1, params).result(TIMEOUT)


def test_which_they_are(tokenizer: Any) -> None:
    ids = sorted(tokenizer.get_vocab().values())
    vocab = ids[-1] + 5
    assert ids_without_a_token(tokenizer, vocab, {vocab - 1}) == sorted(set(range(vocab - 1)) - set(ids))
    assert ids_without_a_token(tokenizer, 3, ()) == []
    assert ids_without_a_token(None, vocab, ()) == []
