"""From logits to tokens: filters, the renormalised distribution, uniform numbers, and what is drawn."""

import numpy as np
import pytest
import torch

from nat_plugin_evsys.engine.sampling.decoding import RowParams, draw, sampled_logprobs, stream_keys, uniforms


def params(*rows, vocab):
    return RowParams.build(list(rows), vocab, torch.device("cpu"))


def brute_force(logits, temperature, top_k, top_p):
    """The documented rule, token by token, in float64."""
    z = [x / temperature for x in logits]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    kept = order if top_k <= 0 else order[:top_k]
    weights = np.exp(np.array([z[i] for i in kept]) - z[order[0]])
    probs = weights / weights.sum()
    nucleus, total = [], 0.0
    for token, prob in zip(kept, probs, strict=True):
        if top_p < 1 and total >= top_p and nucleus:
            break
        nucleus.append((token, prob))
        total += prob
    out = np.full(len(z), -np.inf)
    for token, prob in nucleus:
        out[token] = np.log(prob / sum(p for _, p in nucleus))
    return out


def test_temperature_top_k_top_p_against_brute_force():
    generator = torch.Generator().manual_seed(0)
    rows = [
        (1.0, -1, 1.0),
        (0.5, 5, 1.0),
        (1.5, -1, 0.7),
        (0.8, 9, 0.6),
        (2.0, 0, 0.0),
        (1.0, 1, 0.9),
        (1.0, 999, 0.95),
    ]
    logits = torch.randn(len(rows), 40, generator=generator) * 3
    logits[1, 3:9] = logits[1].max()  # ties at the border of top_k
    got = sampled_logprobs(logits, params(*rows, vocab=40)).numpy()
    for i, row in enumerate(rows):
        want = brute_force(logits[i].tolist(), *row)
        assert (np.isinf(got[i]) == np.isinf(want)).all()
        finite = np.isfinite(want)
        assert np.abs(got[i][finite] - want[finite]).max() < 1e-5
    assert np.isfinite(got[4]).sum() == 1  # top_p 0 still keeps the likeliest token


def test_filters_of_one_row_leave_the_others_alone():
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    got = sampled_logprobs(logits, params((1.0, -1, 1.0), (1.0, 2, 1.0), (1.0, -1, 1.0), vocab=20))
    assert torch.equal(got[[0, 2]], logits[[0, 2]].log_softmax(-1))
    assert torch.isfinite(got[1]).sum() == 2


def test_greedy_is_argmax_with_the_logprob_of_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    p = params((0.0, 1, 0.1), (0.0, -1, 1.0), vocab=4)
    logprobs = sampled_logprobs(logits, p)
    assert torch.equal(logprobs, logits.log_softmax(-1))
    assert draw(logprobs, p, np.array([0.99, 0.99])).tolist() == [1, 0]
    mixed = params((0.0, -1, 1.0), (1.0, -1, 1.0), vocab=4)
    assert draw(sampled_logprobs(logits, mixed), mixed, np.array([0.99, 0.9999])).tolist() == [1, 3]


def test_draw_inverts_the_cdf_and_never_picks_an_impossible_token():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(4, 5)
    p = params(*[(1.0, -1, 1.0)] * 4, vocab=5)
    last = 1 - 2.0**-52
    assert draw(sampled_logprobs(logits, p), p, np.array([0.0, 0.4999, 0.5001, last])).tolist() == [1, 1, 3, 3]


def test_draws_follow_the_probabilities():
    """Chi-square over 200,000 draws; the bound is the 1e-6 quantile, and the seed is fixed."""
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)) * 1.5
    n = 200_000
    for row in [(1.0, -1, 1.0), (0.7, 10, 1.0), (1.3, -1, 0.8)]:
        p = params(row, vocab=32)
        logprobs = sampled_logprobs(logits, p)
        keys = stream_keys(123, n)
        u = uniforms(keys, np.zeros(n, dtype=np.uint64))
        many = params(*[row] * n, vocab=32)
        counts = np.bincount(draw(logprobs.expand(n, -1), many, u).numpy(), minlength=32)
        expected = logprobs[0].double().exp().numpy() * n
        kept = expected > 0
        assert counts[~kept].sum() == 0
        chi2 = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
        freedom = kept.sum() - 1
        assert chi2 < freedom + 5 * np.sqrt(2 * freedom) + 15
        assert chi2 > freedom - 5 * np.sqrt(2 * freedom)  # a rigged "exactly right" would be as wrong


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_deterministic_algorithms_sample_the_same(device):
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float().to(device)
    rows = RowParams.build([(0.7, 0, 0.9), (1.0, 5, 1.0)] * 4, 300, torch.device(device))
    u = uniforms(stream_keys(1, 8), np.arange(8, dtype=np.uint64))
    found = []
    for on in (False, True):
        torch.use_deterministic_algorithms(on)
        try:
            found.append(draw(sampled_logprobs(logits, rows), rows, u))
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.equal(*found)


def test_uniforms_are_uniform_along_positions_and_across_samples():
    keys = stream_keys(0, 256)
    assert len(set(keys.tolist())) == 256
    table = np.stack([uniforms(keys, np.full(256, t, dtype=np.uint64)) for t in range(256)])
    assert 0 <= table.min() < 1e-3 < 1 - 1e-3 < table.max() < 1
    assert abs(table.mean() - 0.5) < 0.005
    for axis in (0, 1):
        means = table.mean(axis=axis)
        assert np.abs(means - 0.5).max() < 5 * np.sqrt(1 / 12 / 256)
    neighbours = np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]
    assert abs(neighbours) < 0.02
    other = uniforms(stream_keys(1, 256), np.zeros(256, dtype=np.uint64))
    assert abs(np.corrcoef(table[0], other)[0, 1]) < 0.3


def test_negative_and_huge_seeds_are_seeds():
    assert stream_keys(-1, 2).tolist() != stream_keys(1, 2).tolist()
    assert stream_keys(2**70 + 5, 1).tolist() == stream_keys(5, 1).tolist()
    assert stream_keys(5, 3).tolist()[:2] == stream_keys(5, 2).tolist()
