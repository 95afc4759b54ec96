"""Constrained decoding: on every way of sampling, beside rows that are free, with the policy's own logprobs."""

import json

import pytest
import torch
from samples import assert_same_samples
from tinker.types import ModelInput, SamplingParams

from nat_plugin_evsys.engine import sampler as sampler_module
from nat_plugin_evsys.engine.sampling.exact_runner import ExactRunner
from nat_plugin_evsys.engine.sampling.grammars import Grammars
from nat_plugin_evsys.errors import DataError

TIMEOUT = 60
END = 0  # the tokenizer's EOS
PROMPT = [5, 6, 7, 8]
SCHEMA = {
    "type": "object",
    "properties": {"team": {"enum": ["lazy dog", "quick fox"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["team", "n"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = f'start: "the answer " %json {json.dumps(SCHEMA)}'
WAYS = {"fast": {}, "plain": {"path": "plain"}, "small memory": {"kv_cache_bytes": 20_000}, "one by one": {}}


@pytest.fixture(params=[*WAYS, "without a cache"])
def client(request, base, adapter, make_sampler, monkeypatch):
    way = request.param
    if way not in ("fast", "plain", "small memory"):
        runner = ExactRunner(base, cached=way == "one by one")
        monkeypatch.setattr(sampler_module, "trusted_runner", lambda base: (runner, "it was asked for"))
    sampler = make_sampler(base, **WAYS.get(way, {}))
    assert bool(sampler.plain_because) == (way not in ("fast", "small memory"))
    return sampler.client(adapter, 1)


def test_replies_have_the_form_and_the_policys_own_logprobs(client, base, adapter, plain_logits, tokenizer):
    constraint = client.grammars.compile(GRAMMAR, [END])
    assert tokenizer.decode(constraint.prefix).startswith("the answer")
    prompt = [*PROMPT, *constraint.prefix]
    free = SamplingParams(max_tokens=20, temperature=1.3, seed=2, stop=[])
    alone = client.sample(ModelInput.from_ints(PROMPT), 3, free).result(TIMEOUT).sequences
    for params in (
        SamplingParams(max_tokens=60, temperature=1.3, seed=1),
        SamplingParams(max_tokens=60, temperature=1.3, seed=1, top_k=2, top_p=0.5),
        SamplingParams(max_tokens=60, temperature=0),
    ):
        beside = client.sample(ModelInput.from_ints(PROMPT), 3, free)
        constrained = client.sample(ModelInput.from_ints(prompt), 3, params, constraint=constraint).result(TIMEOUT)
        assert_same_samples(
            alone, beside.result(TIMEOUT).sequences, PROMPT, free, lambda ids: plain_logits(base, adapter, ids)
        )
        for sequence in constrained.sequences:
            text = tokenizer.decode([*constraint.prefix, *sequence.tokens[:-1]])
            value = json.loads(text.removeprefix("the answer "))
            assert value["team"] in SCHEMA["properties"]["team"]["enum"]
            assert 0 <= value["n"] <= 9
            assert (sequence.tokens[-1], sequence.stop_reason) == (END, "stop")
            rows = plain_logits(base, adapter, [*prompt, *sequence.tokens])[len(prompt) - 1 : -1]
            own = (rows / (params.temperature or 1)).log_softmax(-1)
            want = own.gather(1, torch.tensor(sequence.tokens).unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(torch.tensor(sequence.logprobs), want, atol=1e-5, rtol=0)
            assert float(want.min()) < -4, "an untrained model says nothing of the kind by itself"


def test_tokens_without_a_choice_are_known_afterwards(base, adapter, make_sampler, tokenizer):
    client = make_sampler(base).client(adapter, 1)
    constraint = client.grammars.compile(GRAMMAR, [END])
    params = SamplingParams(max_tokens=60, seed=1)
    prompt = ModelInput.from_ints([*PROMPT, *constraint.prefix])
    (sequence,) = client.sample(prompt, 1, params, constraint=constraint).result(TIMEOUT).sequences
    forced = constraint.forced(sequence.tokens)
    assert 0 < len(forced) < len(sequence.tokens)
    assert len(sequence.tokens) - 1 in forced, "the end is all that the complete object leaves"
    # Another token is refused where one was forced, and there is another where none was.
    state, allowed = constraint.begin(), []
    for token in sequence.tokens:
        allowed.append(int(state.allowed.sum()))
        state.accept(token)
    assert [position for position, count in enumerate(allowed) if count == 1] == forced
    assert constraint.forced(sequence.tokens[:3]) == [position for position in forced if position < 3]


def test_a_sequence_without_an_end_token_ends_with_its_sentence(base, adapter, make_sampler, tokenizer):
    client = make_sampler(base).client(adapter, 1)
    constraint = client.grammars.compile('start: ("yes" | "no") "!"', [])
    params = SamplingParams(max_tokens=60, seed=1, stop=[])
    result = client.sample(ModelInput.from_ints(PROMPT), 4, params, constraint=constraint).result(TIMEOUT)
    assert {tokenizer.decode(s.tokens) for s in result.sequences} <= {"yes!", "no!"}
    assert {s.stop_reason for s in result.sequences} == {"stop"}


def test_what_cannot_be_compiled_is_refused(base, tokenizer):
    grammars = Grammars(tokenizer, base.vocab_size, frozenset([END]))
    for grammar in ("start: nothing_defined", 'start: %json {"type": "no type"}', "start: /(/"):
        with pytest.raises(DataError, match="cannot be compiled"):
            grammars.compile(grammar, [END])
    lenient = 'start: %json {"type": "object", "patternProperties": {"(?=x)": {}}, "x-guidance": {"lenient": true}}'
    assert grammars.compile('start: "a"', [END]).ignored == []
    with pytest.raises(DataError):
        grammars.compile("start: " + lenient[:-20], [END])
    other = grammars.compile('start: "a" "b"', [END])
    with pytest.raises(DataError, match="cannot be followed"):
        other.begin().accept(99)
