"""Calls of which tokens were ruled out: the learner starts at ratio 1, and what a grammar forced carries no loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from groups import steps_of
from tinker import types

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.rollouts.datums import group_datums
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.runtime.extensions import SamplingParams
from nat_plugin_evsys.training.fates import learner_logprobs

GRAMMAR = 'start: "The team is " ("billing" | "network" | "hardware") ", " /[a-z]{3,9}/ "."'
PROMPT = [1, 2, 3]
END = 256


async def sampled_group(backend: Any, grammar: str | None, temperature: float, **fields: Any) -> TrajectoryGroup:
    client = await backend.snapshot_sampling_client()
    constraint = None if grammar is None else client.grammars.compile(grammar, [END])
    prompt = [*PROMPT, *([] if constraint is None else constraint.prefix)]
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=1, **fields)
    response = await client.sample_async(types.ModelInput.from_ints(prompt), 6, params, constraint=constraint)
    calls = [
        Call(
            call_id=f"call-{index}",
            index=0,
            run_id="run",
            step_id=None,
            policy_version=client.policy_version,
            prompt_ids=prompt,
            output_ids=sequence.tokens,
            logprobs=sequence.logprobs,
            stop_reason=sequence.stop_reason,
            temperature=temperature,
            top_p=1.0,
            messages=[],
            tools=[],
            reply={},
            sequence=index,
            constrained=constraint is not None,
            forced=[] if constraint is None else constraint.forced(sequence.tokens),
        )
        for index, sequence in enumerate(response.sequences)
    ]
    return TrajectoryGroup("group", [float(n % 3) for n in range(len(calls))], [[call] for call in calls])


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "gspo", "dro"])
async def test_the_ratio_is_1_and_what_was_forced_has_no_loss(loss_fn: str, make_backend: Any) -> None:
    backend = await make_backend(perturbed=True)
    group = await sampled_group(backend, GRAMMAR, 0.8)
    (step,) = await steps_of(backend, [group], loss_fn=loss_fn, kl_beta=0.05 if loss_fn != "dro" else 0.0)
    output = await backend.forward_backward_async(step.data, loss_fn=step.loss.name, loss_fn_config=step.loss.config)
    assert output.metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert output.metrics["ratio:max"] == pytest.approx(1.0, abs=1e-3)
    calls = [call for calls in group.calls_G for call in calls]
    assert step.sampled_tokens == sum(len(call.output_ids) - len(call.forced) for call in calls)
    for datum, call, result in zip(step.data, calls, output.loss_fn_outputs, strict=True):
        advantages = np.array(datum.loss_fn_inputs["advantages"].tolist())
        logprobs = np.array(datum.loss_fn_inputs["logprobs"].tolist())
        start = len(call.prompt_ids) - 1
        forced = {start + position for position in call.forced}
        assert forced
        assert not advantages[sorted(forced)].any()
        if loss_fn == "gspo":
            mask = np.array(datum.loss_fn_inputs["sequence_ratio_mask"].tolist())
            assert set(np.flatnonzero(mask)) == set(range(start, start + len(call.output_ids))) - forced
        # dro has no mask: a row without a loss has the learner's own logprob.
        learner = np.array(result["logprobs"].tolist())
        np.testing.assert_allclose(logprobs[start:], learner[start:], atol=1e-4)
        assert logprobs[sorted(forced)].min() < -1, "the policy itself would have said something else"


async def test_what_was_forced_has_no_logprob_of_the_learner(make_backend: Any) -> None:
    backend = await make_backend(perturbed=True, untrained_logprobs=False)  # as `nat finetune` makes it
    group = await sampled_group(backend, GRAMMAR, 0.8)
    (step,) = await steps_of(backend, [group])
    output = await backend.forward_backward_async(step.data, loss_fn=step.loss.name, loss_fn_config=step.loss.config)
    learned = learner_logprobs([group_datums(group, advantage="group_mean")], output)
    assert learned
    for call in (call for calls in group.calls_G for call in calls if call.key in learned):
        assert [at for at, value in enumerate(learned[call.key]) if value is None] == call.forced
        known = [(own, old) for own, old in zip(learned[call.key], call.logprobs, strict=True) if own is not None]
        assert known
        np.testing.assert_allclose(*zip(*known, strict=True), atol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [{"min_tokens": 12, "stop": [END, 7, 8, 9]}, {"logit_bias": dict.fromkeys(range(16, 256), -100.0)}],
    ids=["min_tokens", "bans"],
)
async def test_the_ratio_is_1_where_tokens_were_ruled_out(fields: dict[str, Any], make_backend: Any) -> None:
    backend = await make_backend(perturbed=True)
    group = await sampled_group(backend, None, 0.8, **fields)
    calls = [call for calls in group.calls_G for call in calls]
    bias = fields.get("logit_bias", {})
    assert not {token for call in calls for token in call.output_ids} & set(bias)
    assert min(len(call.output_ids) for call in calls) >= fields.get("min_tokens", 1)
    (step,) = await steps_of(backend, [group], loss_fn="ppo", kl_beta=0.0)
    output = await backend.forward_backward_async(step.data, loss_fn=step.loss.name, loss_fn_config=step.loss.config)
    assert output.metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert output.metrics["ratio:max"] == pytest.approx(1.0, abs=1e-3)
    assert step.sampled_tokens == sum(len(call.output_ids) for call in calls)
