"""DPO: Datums from NAT's preference items, loss and gradient against autograd, and a preference that is learnt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from nat.data_models.finetuning import DPOItem, OpenAIMessage
from tiny import perturb

from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.training.dpo import (
    REFERENCE,
    DpoStep,
    build_dpo_pairs,
    dpo_loss,
    train_dpo,
    with_reference,
)

ITEMS = [
    DPOItem(prompt="name a star", chosen_response="sun", rejected_response="the moon"),
    DPOItem(
        prompt=[OpenAIMessage(role="user", content="hi"), OpenAIMessage(role="assistant", content="yo")],
        chosen_response="good day",
        rejected_response="what",
    ),
    DPOItem(prompt="colour?", chosen_response="blue", rejected_response="red"),
]


def test_a_pair_shares_its_prompt_and_weighs_its_replies(render: Any, render_reply: Any) -> None:
    pairs = build_dpo_pairs(ITEMS, render, render_reply)
    prompts = [
        render([{"role": "user", "content": "name a star"}]),
        render([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]),
        render([{"role": "user", "content": "colour?"}]),
    ]
    for prompt, item, pair in zip(prompts, ITEMS, pairs, strict=True):
        for text, datum in zip((item.chosen_response, item.rejected_response), pair, strict=True):
            reply = render_reply({"content": text})
            assert datum.model_input.to_ints() == [*prompt, *reply][:-1]
            assert datum.loss_fn_inputs["target_tokens"].tolist() == [*prompt, *reply][1:]
            assert datum.loss_fn_inputs["weights"].tolist() == [0.0] * (len(prompt) - 1) + [1.0] * len(reply)


def test_bad_items(render: Any, render_reply: Any) -> None:
    same = DPOItem(prompt="x", chosen_response="a", rejected_response="a")
    with pytest.raises(DataError, match=r"items\[3\]: the chosen and the rejected response have the same tokens"):
        build_dpo_pairs([*ITEMS, same], render, render_reply)
    with pytest.raises(DataError, match=r"items\[0\] renders to \d+ prompt and 0, 0 reply tokens"):
        build_dpo_pairs(ITEMS, render, lambda message: [])


async def test_loss_and_gradient_are_autograds(
    make_backend: Any, render: Any, render_reply: Any, full_logprobs: Any, gradient_error: Any
) -> None:
    """The reference policy is the fresh adapter; the learner's B is then moved away from zero."""
    backend, beta = await make_backend(), 0.3
    plain = build_dpo_pairs(ITEMS, render, render_reply)

    def reply_logprob(datum: Any) -> torch.Tensor:
        targets, weights = (datum.loss_fn_inputs[key].to_torch() for key in ("target_tokens", "weights"))
        rows = full_logprobs(backend, datum.model_input.to_ints())
        return rows.gather(1, targets[:, None])[:, 0][weights == 1].sum()

    with torch.no_grad():
        references = [[reply_logprob(datum) for datum in pair] for pair in plain]
    pairs = await with_reference(backend, plain)
    perturb(backend._model.adapter, seed=1, std=0.1)
    margins = torch.stack(
        [
            beta * ((reply_logprob(chosen) - ref_c) - (reply_logprob(rejected) - ref_r))
            for (chosen, rejected), (ref_c, ref_r) in zip(plain, references, strict=True)
        ]
    )
    loss = -torch.log(1 / (1 + torch.exp(-margins))).sum()
    value = loss.item()
    output = await backend.forward_backward_custom_async([d for pair in pairs for d in pair], dpo_loss(beta))
    assert output.metrics["loss:sum"] == pytest.approx(value, rel=1e-5)
    assert output.metrics["loss:mean"] == pytest.approx(value / 3, rel=1e-5)
    assert output.metrics["margin:mean"] == pytest.approx(margins.mean().item(), rel=1e-4)
    assert output.metrics["accuracy:mean"] == pytest.approx(float((margins > 0).double().mean()))
    for position, name in enumerate(("chosen", "rejected")):
        gaps = [reply_logprob(pair[position]) - ref[position] for pair, ref in zip(plain, references, strict=True)]
        expected = beta * torch.stack(gaps).mean().item()
        assert output.metrics[f"{name}_reward:mean"] == pytest.approx(expected, rel=1e-4)
    assert gradient_error(backend, loss) < 1e-5


async def test_the_reference_is_the_policy_before_training(make_backend: Any, render: Any, render_reply: Any) -> None:
    backend = await make_backend(perturbed=True)
    (chosen, rejected), *_ = await with_reference(backend, build_dpo_pairs(ITEMS, render, render_reply))
    now = await backend.forward_async(
        [type(d)(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in (chosen, rejected)],
        loss_fn="cross_entropy",
    )
    for datum, output in zip((chosen, rejected), now.loss_fn_outputs, strict=True):
        assert datum.loss_fn_inputs[REFERENCE].tolist() == pytest.approx(output["logprobs"].tolist(), abs=1e-5)


async def test_it_learns_the_preference(make_backend: Any, render: Any, render_reply: Any) -> None:
    backend = await make_backend(perturbed=True)
    pairs = build_dpo_pairs(ITEMS, render, render_reply)
    seen: list[DpoStep] = []
    steps = await train_dpo(
        backend, pairs, epochs=10, batch_size=2, learning_rate=5e-3, beta=0.5, seed=1, on_step=seen.append
    )
    assert seen == steps
    assert [s.pairs for s in steps] == [2, 1] * 10
    first, last = steps[0], steps[-1]
    assert first.loss == pytest.approx(math.log(2), abs=1e-4)
    assert first.margin == pytest.approx(0.0, abs=1e-3)
    assert sum(s.loss for s in steps[-2:]) / 2 < 0.1
    assert last.accuracy == 1.0
    assert last.margin == pytest.approx(last.chosen_reward - last.rejected_reward)
    assert last.learning_rate == pytest.approx(5e-3 / 20)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": math.inf}, {"epochs": 0}, {"learning_rate": -1.0}])
async def test_bad_dpo_settings(wrong: dict[str, Any], make_backend: Any, render: Any, render_reply: Any) -> None:
    pairs = build_dpo_pairs(ITEMS, render, render_reply)
    with pytest.raises(ConfigError, match="dpo needs"):
        await train_dpo(await make_backend(), pairs, **{"epochs": 1, "batch_size": 1, "learning_rate": 1e-3, **wrong})


async def test_no_pairs(make_backend: Any) -> None:
    with pytest.raises(DataError, match="no pairs"):
        await train_dpo(await make_backend(), [], epochs=1, batch_size=1, learning_rate=1e-3)
