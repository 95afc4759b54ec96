"""What the adapter trains on, and that it trains."""

import importlib.util
import json
import math
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from nat.data_models.finetuning import (
    EpisodeItem,
    FinetuneConfig,
    TrainingStatusEnum,
    Trajectory,
    TrajectoryCollection,
)
from tinker import types

from nat_plugin_evsys.backends.base import Architecture
from nat_plugin_evsys.errors import ConfigError, DataError, ShapedDistributionError
from nat_plugin_evsys.rollouts.trajectories import calls_of

Fixture = Any


def calls_in(collection: TrajectoryCollection) -> dict[str, Any]:
    return {c.call_id: c for row in collection.trajectories for trajectory in row for c in calls_of(trajectory)}


async def run(adapter: Any, collection: TrajectoryCollection) -> Any:
    return await adapter.wait_until_complete(await adapter.submit(collection))


async def test_it_learns(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, learning_rate=0.05, lr_warmup=0)
    rewards = []
    for epoch in range(6):
        collection = await policy.collection(groups=4, size=16, seed=epoch)
        rewards.append(sum(t.reward for row in collection.trajectories for t in row) / 64)
        assert (await run(adapter, collection)).status is TrainingStatusEnum.COMPLETED
    # By chance the wanted token is 1 of 32.
    assert rewards[0] < 0.08
    assert rewards[-1] > rewards[0] + 0.15


async def test_a_run_that_ends_within_its_warmup_says_so(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, learning_rate=2e-3)
    assert adapter.warmup_notice() is None, "nothing was trained"
    await run(adapter, await policy.collection(groups=4, size=4, seed=0))
    assert adapter.warmup_notice() == (
        "the run took 1 optimizer step and the warm-up takes 16, so the learning rate reached at most 1/16 of 0.002; "
        "run more epochs, or set `lr_warmup` on the trainer adapter"
    )
    without = make_adapter(policy, learning_rate=2e-3, lr_warmup=0)
    await run(without, await policy.collection(groups=4, size=4, seed=0))
    assert without.warmup_notice() is None


async def test_settings_reach_the_backend(policy: Fixture, make_adapter: Fixture) -> None:
    adam = {
        "learning_rate": 3e-3,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-6,
        "weight_decay": 0.05,
        "grad_clip_norm": 0.7,
    }
    clip = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.4}
    adapter = make_adapter(
        policy,
        loss_fn="ppo",
        loss_fn_config=clip,
        groups_per_step=2,
        passes=2,
        normalization="sum",
        lr_warmup=0,
        **adam,
    )
    await run(adapter, await policy.collection(groups=3, size=4))
    assert policy.backend.calls == [
        entry
        for datums in (8, 4, 8, 4)
        for entry in (("forward_backward", (datums, "ppo", clip)), ("optim_step", types.AdamParams(**adam)))
    ]


async def test_the_schedule_is_over_the_runs_epochs(policy: Fixture, make_adapter: Fixture) -> None:
    """Also for a run that resumes: the rate depends on the epoch's number alone."""
    adapter = make_adapter(
        policy, learning_rate=1.0, lr_schedule="linear", lr_warmup=0, groups_per_step=2, target_kl=None
    )
    await adapter.initialize(FinetuneConfig(num_epochs=4))
    collection = await policy.collection(groups=4, size=2)
    rates = {}
    for epoch in (2, 0, 3, 1):
        policy.backend.calls.clear()
        status = await adapter.wait_until_complete(await adapter.submit(collection, epoch=epoch))
        rates[epoch] = [adam.learning_rate for verb, adam in policy.backend.calls if verb == "optim_step"]
        assert status.metadata["metrics"]["learning_rate"] == pytest.approx(sum(rates[epoch]) / 2)
    expected = {0: [1, 7 / 8], 1: [6 / 8, 5 / 8], 2: [4 / 8, 3 / 8], 3: [2 / 8, 1 / 8]}
    assert rates == {epoch: pytest.approx(two) for epoch, two in expected.items()}


@pytest.mark.parametrize("chosen", [None, 2e-4])
async def test_a_rate_that_is_not_set_is_that_of_the_models_width(
    chosen: float | None, policy: Fixture, make_adapter: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await policy.ensure_loaded()
    assert policy.backend.get_architecture() == Architecture("qwen3", 32)
    monkeypatch.setattr(policy.backend, "get_architecture", lambda: Architecture("llama", 4096))
    adapter = make_adapter(policy, lr_warmup=0, **({} if chosen is None else {"learning_rate": chosen}))
    await adapter.initialize(FinetuneConfig(num_epochs=4))
    expected = chosen or 0.00029
    status = await adapter.wait_until_complete(await adapter.submit(await policy.collection(groups=2, size=4)))
    assert status.metadata["metrics"]["learning_rate"] == pytest.approx(expected)


async def test_a_loss_that_is_preferred_is_refused_with_settings_that_it_has_no_use_for(
    policy: Fixture, make_adapter: Fixture
) -> None:
    adapter = make_adapter(policy, kl_beta=0.1)
    with pytest.raises(ConfigError, match=r"loss_fn is cross_entropy, because .* kl_beta would have no effect"):
        adapter.prefer_loss("cross_entropy", "the traces' best replies are learned")
    assert adapter.config.loss_fn == "importance_sampling"


async def test_every_trained_id_was_served(policy: Fixture, make_adapter: Fixture, tmp_path: Path) -> None:
    collection = await policy.collection(groups=2, size=4, turns=3)
    adapter = make_adapter(policy, save_datums=True, passes=2)
    status = await run(adapter, collection)
    served = calls_in(collection)
    lines = (tmp_path / "run" / f"datums-{status.metadata['job_id']}.jsonl").read_text().splitlines()
    assert len(lines) == 8  # once each, though trained on twice
    trained = []
    for datum in map(json.loads, lines):
        tokens = [*datum["model_input"], datum["target_tokens"][-1]]
        assert datum["target_tokens"] == tokens[1:]
        for span in datum["calls"]:
            call = served[span["call_id"]]
            trained.append(call.call_id)
            assert tokens[: span["stop"] + 1] == call.prompt_ids + call.output_ids
            assert datum["logprobs"][span["start"] : span["stop"]] == pytest.approx(call.logprobs, abs=1e-7)
            assert len(set(datum["advantages"][span["start"] : span["stop"]])) == 1
    assert sorted(trained) == sorted(served)
    assert status.metadata["trained"] == status.metadata["calls"] == len(served) == 24
    adapter.run_dir = None
    with pytest.raises(ConfigError, match="save_datums is set"):
        await adapter.submit(collection)


async def test_merged_calls_give_the_same_step(make_policy: Fixture, make_adapter: Fixture) -> None:
    results = []
    for merge in (True, False):
        policy = make_policy()
        start = policy.weights()
        collection = await policy.collection(groups=2, size=4, turns=3)
        # A large eps makes the step proportional to the gradient, so that rounding is not blown up to +-lr.
        await run(make_adapter(policy, merge_calls=merge, eps=1.0, learning_rate=1.0), collection)
        assert policy.backend.calls[0][1][0] == (8 if merge else 24)
        results.append({name: tensor - start[name] for name, tensor in policy.weights().items()})
    scale = max(float(delta.abs().max()) for delta in results[0].values())
    assert scale > 0
    for name, delta in results[0].items():
        torch.testing.assert_close(delta, results[1][name], rtol=0, atol=1e-5 * scale)


async def test_dro_does_not_pull_at_the_prompt(make_policy: Fixture, make_adapter: Fixture) -> None:
    beta = 0.5
    policy, reference = make_policy(), make_policy()
    collection = await policy.collection(groups=1, size=4, turns=2)
    start = policy.weights()
    adapter = make_adapter(
        policy,
        loss_fn="dro",
        loss_fn_config={"beta": beta},
        advantage="group_mean",
        eps=1.0,
        learning_rate=1.0,
        lr_warmup=0,
        merge_calls=False,
        normalization="sum",
        grad_clip_norm=0.0,
    )
    status = await run(adapter, collection)
    assert status.status is TrainingStatusEnum.COMPLETED, status.message

    # The same loss by hand, over sampled tokens only.
    row = collection.trajectories[0]
    mean = math.fsum(t.reward for t in row) / len(row)
    calls = [(call, t.reward - mean) for t in row for call in calls_of(t)]

    def loss(data: Any, logprobs: list[torch.Tensor]) -> Any:
        total = torch.zeros(())
        for (call, advantage), lp in zip(calls, logprobs, strict=True):
            sampled = lp[-len(call.output_ids) :]
            gap = sampled - torch.tensor(call.logprobs)
            total = total - (sampled * advantage - 0.5 * beta * gap**2).sum()
        return total, {}

    data = [_language_model_datum(call.prompt_ids + call.output_ids) for call, _ in calls]
    await reference.backend.forward_backward_custom_async(data, loss)
    await reference.backend.optim_step_async(types.AdamParams(learning_rate=1.0, eps=1.0, beta1=0.9, beta2=0.95))
    expected = {name: tensor - start[name] for name, tensor in reference.weights().items()}
    scale = max(float(delta.abs().max()) for delta in expected.values())
    assert scale > 0
    for name, tensor in policy.weights().items():
        torch.testing.assert_close(tensor - start[name], expected[name], rtol=0, atol=1e-4 * scale)


def _language_model_datum(ids: list[int]) -> types.Datum:
    target = types.TensorData(data=ids[1:], dtype="int64", shape=[len(ids) - 1])
    return types.Datum(model_input=types.ModelInput.from_ints(ids[:-1]), loss_fn_inputs={"target_tokens": target})


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
async def test_every_loss_of_the_config_trains(policy: Fixture, make_adapter: Fixture, loss_fn: str) -> None:
    start = policy.weights()
    status = await run(make_adapter(policy, loss_fn=loss_fn), await policy.collection(turns=2))
    assert status.status is TrainingStatusEnum.COMPLETED, status.message
    assert any(not torch.equal(tensor, start[name]) for name, tensor in policy.weights().items())


async def test_nothing_to_train_completes_with_zero_steps_and_says_so(policy: Fixture, make_adapter: Fixture) -> None:
    collection = await policy.collection(groups=2, size=4)
    for trajectory in (t for row in collection.trajectories for t in row):
        trajectory.reward = 0.25
    collection.trajectories[1] = collection.trajectories[1][:1]
    start = policy.weights()
    status = await run(make_adapter(policy), collection)
    assert (status.status, status.progress) == (TrainingStatusEnum.COMPLETED, 100.0)
    assert status.message == (
        "nothing to train: every call was dropped (single_trajectory_group: 1, zero_variance_group: 4); "
        "the policy is unchanged"
    )
    metadata = status.metadata
    assert (metadata["steps"], metadata["calls"], metadata["trained"]) == (0, 5, 0)
    assert metadata["dropped"] == {"zero_variance_group": 4, "single_trajectory_group": 1}
    assert metadata["policy_version"] is None
    assert policy.backend.calls == []
    assert policy.client.policy_version == 0
    assert all(torch.equal(tensor, start[name]) for name, tensor in policy.weights().items())


async def test_groups_without_signal_do_not_fill_a_step(policy: Fixture, make_adapter: Fixture) -> None:
    collection = await policy.collection(groups=3, size=4)
    for trajectory in collection.trajectories[1]:
        trajectory.reward = 1.0
    status = await run(make_adapter(policy, groups_per_step=2), collection)
    assert [call for call in policy.backend.calls if call[0] == "forward_backward"] == [
        ("forward_backward", (8, "importance_sampling", None))
    ]
    assert (status.metadata["trained"], status.metadata["dropped"]) == (8, {"zero_variance_group": 4})


async def test_groups_that_failed_are_trained_on_beside_the_epochs_mean(policy: Fixture, make_adapter: Fixture) -> None:
    collection = await policy.collection(groups=3, size=4)
    for trajectory in collection.trajectories[1]:
        trajectory.reward = 0.0
    metadata = (await run(make_adapter(policy, failed_groups="batch_mean"), collection)).metadata
    assert (metadata["trained"], metadata["dropped"], metadata["metrics"]["groups_failed"]) == (12, {}, 1 / 3)
    dropped = (await run(make_adapter(policy), collection)).metadata
    assert (dropped["trained"], dropped["dropped"]) == (8, {"zero_variance_group": 4})
    assert dropped["metrics"]["groups_failed"] == 0.0


async def test_a_pull_to_the_base_is_measured_and_changes_the_step(make_policy: Fixture, make_adapter: Fixture) -> None:
    moved = []
    for options in ({}, {"kl_beta": 5.0, "kl_estimator": "k3"}):
        policy = make_policy()
        await run(make_adapter(policy, learning_rate=0.05), await policy.collection(groups=2, size=4))  # off the base
        await policy.publish()
        status = await run(make_adapter(policy, **options), await policy.collection(groups=2, size=4))
        assert ("kl_base:mean" in status.metadata["metrics"]) == bool(options)
        moved.append(policy.weights())
    assert status.metadata["metrics"]["kl_base:mean"] > 0
    assert any(not torch.equal(tensor, moved[1][name]) for name, tensor in moved[0].items())


async def test_steps_end_beyond_target_kl(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy, learning_rate=0.1, groups_per_step=1, target_kl=1e-6)
    status = await run(adapter, await policy.collection(groups=3, size=4))
    assert status.status is TrainingStatusEnum.COMPLETED
    assert [verb for verb, _ in policy.backend.calls].count("optim_step") == 1
    assert (status.metadata["trained"], status.metadata["dropped"]) == (4, {"moved_too_far": 8})
    assert status.metadata["metrics"]["steps"] == 1


async def test_records_of_another_policy_do_not_slow_the_steps(policy: Fixture, make_adapter: Fixture) -> None:
    """They are 0.5 nats from the policy, whatever it does; what counts is how far the steps move it."""
    collection = await policy.collection(groups=3, size=4)
    for call in calls_in(collection).values():
        call.logprobs[:] = [logprob - 1 for logprob in call.logprobs]
    adapter = make_adapter(policy, learning_rate=1e-6, groups_per_step=1, target_kl=0.3)
    adapter.expect_records("a test")
    for _ in range(2):
        status = await run(adapter, collection)
        metrics = status.metadata["metrics"]
        assert (metrics["lr_factor"], status.metadata["trained"]) == (1.0, 12)
        assert metrics["kl_moved"] < 1e-3 < 0.4 < metrics["kl_v2:mean"]


async def test_the_rate_goes_on_where_an_earlier_process_left_it(make_policy: Fixture, make_adapter: Fixture) -> None:
    settings = {"learning_rate": 0.1, "target_kl": 1e-4, "lr_warmup": 4, "groups_per_step": 1}
    policy = make_policy()
    adapter = make_adapter(policy, **settings)
    jobs = [(await run(adapter, await policy.collection(groups=2, size=4))).metadata for _ in range(2)]
    assert jobs[-1]["metrics"]["lr_factor"] < 1
    taken = sum(job["metrics"]["steps"] for job in jobs)
    assert taken == 2, "the second step of each moves too far"
    rates = []
    for other in (adapter, make_adapter(policy, **settings)):
        if other is not adapter:
            other.resume_after(jobs)
        policy.backend.calls.clear()
        await run(other, await policy.collection(groups=2, size=4))
        rates += [adam.learning_rate for verb, adam in policy.backend.calls if verb == "optim_step"]
    assert rates == [0.1 * jobs[-1]["metrics"]["lr_factor"] * 3 / 4] * 2


async def test_each_call_answers_for_what_came_after_it(policy: Fixture, make_adapter: Fixture, tmp_path: Path) -> None:
    """Two turns: a step reward at the second, and the trajectory's own reward at the end, discounted."""
    collection = await policy.collection(groups=1, size=2, turns=2)
    for trajectory, reward, steps in zip(collection.trajectories[0], (1.0, 0.0), ([0.0, 1.0], [0.0, 0.0]), strict=True):
        trajectory.reward, trajectory.shaped_rewards = reward, steps
    status = await run(
        make_adapter(policy, advantage="group_mean", discount=0.5, save_datums=True, merge_calls=False), collection
    )
    lines = (tmp_path / "run" / f"datums-{status.metadata['job_id']}.jsonl").read_text().splitlines()
    # Returns 0.5 * (1 + 1) and 1 + 1 against 0 and 0, each minus the mean of the two.
    found = [[value for value in json.loads(line)["advantages"] if value] for line in lines]
    assert sorted({values[0] for values in found}) == [-1.0, -0.5, 0.5, 1.0]
    assert all(len(set(values)) == 1 for values in found)
    collection.trajectories[0][0].shaped_rewards = [1.0]
    with pytest.raises(DataError, match="give one finite number a call"):
        await make_adapter(policy).submit(collection)


async def test_replies_that_were_cut_off_may_be_left_out(policy: Fixture, make_adapter: Fixture) -> None:
    collection = await policy.collection(groups=1, size=4)  # without a stop token every reply is
    status = await run(make_adapter(policy, mask_truncated=True), collection)
    assert (status.metadata["trained"], status.metadata["dropped"]) == (0, {"truncated": 4})


@pytest.mark.parametrize("cut", [{"top_p": 0.8}, {"top_k": 4}, {"shaped": {"min_p": 0.1}}])
async def test_calls_of_a_cut_distribution_are_refused(policy: Fixture, make_adapter: Fixture, cut: Any) -> None:
    collection = await policy.collection(groups=1, size=2)
    collection.trajectories[0][0].metadata["calls"][0] |= cut
    with pytest.raises(ShapedDistributionError, match="Any temperature is fine"):
        await make_adapter(policy).submit(collection)


async def test_a_step_tells_its_health_by_the_fields_names(policy: Fixture, make_adapter: Fixture) -> None:
    collection = await policy.collection(groups=4, size=4)
    for trajectory in collection.trajectories[1]:
        trajectory.reward = 1.0
    status = await run(make_adapter(policy, loss_fn="ppo", learning_rate=0.05, grad_clip_norm=1e-3), collection)
    metrics = status.metadata["metrics"]
    assert (metrics["groups_without_signal"], metrics["groups_solved"]) == (0.25, 0.25)
    assert metrics["learning_rate"] == pytest.approx(0.05 / 16 * math.sqrt(3 / 4)), "the first step of 16"
    calls = list(calls_in(collection).values())
    assert metrics["reply_tokens"] == pytest.approx(sum(len(call.output_ids) for call in calls) / len(calls))
    # The weights are those that sampled: every ratio is 1 and nothing is clipped, in the first step.
    assert metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["ratio:max"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["clip_fraction:mean"] == 0.0
    assert abs(metrics["kl_v1:mean"]) < 1e-4
    assert 0 < metrics["entropy:mean"] <= math.log(32)
    assert metrics["grad_norm"] > 10 * 1e-3, "the norm is that before clipping"


async def test_a_bad_collection_raises_before_anything_starts(policy: Fixture, make_adapter: Fixture) -> None:
    adapter = make_adapter(policy)
    collection = await policy.collection()
    last = collection.trajectories[-1][-1]
    backwards = last.model_copy(update={"episode": last.episode[::-1]})
    textual = Trajectory(
        episode=[EpisodeItem(role="user", content="q"), EpisodeItem(role="assistant", content="a", logprobs=[])],
        reward=1.0,
    )
    cases = [
        ([], "has no trajectories"),
        ([[], []], "has no trajectories"),
        (
            [*collection.trajectories[:1], [last, backwards]],
            r"trajectory 1 of group 1 \(row .*\), item 0, role `assist",
        ),
        ([[textual]], "trajectory 0 of group 0: no recorded calls"),
    ]
    for rows, text in cases:
        with pytest.raises(ValueError, match=text):
            await adapter.submit(TrajectoryCollection(trajectories=rows, run_id="run"))
    assert adapter.training_jobs == {}
    assert policy.backend.calls == []
    with pytest.raises(ValueError, match="item 0, role `assistant`: the first item"):
        await adapter._validate_episode_order(backwards)


async def test_groups_on_request_as_art_while_training_goes_on(policy: Fixture, make_adapter: Fixture) -> None:
    if importlib.util.find_spec("art") is None:
        pytest.skip("needs openpipe-art (extra `art`)")
    collection = await policy.collection(groups=2, size=3)
    adapter = make_adapter(policy, passes=20)
    ref = await adapter.submit(collection)
    groups = await adapter._construct_trajectory_groups(collection.trajectories, kind="art")
    import art

    assert [type(group) for group in groups] == [art.TrajectoryGroup] * 2
    assert [t.reward for t in groups[0]] == [t.reward for t in collection.trajectories[0]]
    # art patches transformers as it is imported; the engine must not notice.
    assert (await adapter.wait_until_complete(ref)).status is TrainingStatusEnum.COMPLETED
    assert (await run(adapter, collection)).status is TrainingStatusEnum.COMPLETED


async def test_group_order_depends_on_seed_pass_and_epoch_only(make_policy: Fixture, make_adapter: Fixture) -> None:
    async def steps(seed: int, epoch: int | None) -> list[Any]:
        policy = make_policy()
        collection = await policy.collection(groups=1, size=2)
        row = collection.trajectories[0]
        sizes = [[*row, *[row[0]] * extra] for extra in range(5)]  # told apart by their number of Datums
        adapter = make_adapter(policy, groups_per_step=1, passes=2, shuffle_seed=seed)
        ref = await adapter.submit(TrajectoryCollection(trajectories=sizes, run_id="run"), epoch=epoch)
        await adapter.wait_until_complete(ref)
        return [detail[0] for name, detail in policy.backend.calls if name == "forward_backward"]

    first = await steps(0, 1)
    assert sorted(first[:5]) == sorted(first[5:]) == [2, 3, 4, 5, 6]
    assert first[:5] != first[5:]
    assert await steps(0, 1) == first
    assert await steps(1, 1) != first
    assert await steps(0, 2) != first


async def test_it_is_known_what_became_of_every_call(policy: Fixture, make_adapter: Fixture) -> None:
    collection = await policy.collection(groups=2, size=4, turns=2)
    for position, (trajectory, other) in enumerate(zip(*collection.trajectories, strict=True)):
        trajectory.reward, other.reward = position / 4, 0.5
    adapter = make_adapter(policy, learning_rate=1e-3)
    ref = await adapter.submit(collection)
    assert adapter.take_fates(ref) == {}
    await adapter.wait_until_complete(ref)
    fates = adapter.take_fates(ref)
    assert set(fates) == {call.key for call in calls_in(collection).values()}
    rewards = [trajectory.reward for trajectory in collection.trajectories[0]]
    for trajectory in collection.trajectories[0]:
        for call in calls_of(trajectory):
            fate = fates[call.key]
            assert fate.dropped is None
            assert fate.advantage == pytest.approx((trajectory.reward - fmean(rewards)) / pstdev(rewards), abs=1e-6)
            # the learner is the policy that sampled, so it finds the tokens as likely
            assert fate.learner_logprobs == pytest.approx(call.logprobs, abs=1e-4)
    for trajectory in collection.trajectories[1]:
        assert {fates[call.key].dropped for call in calls_of(trajectory)} == {"zero_variance_group"}
    assert adapter.take_fates(ref) == {}  # they are handed over once


def said(reply: str, reward: float, question: str = "abc") -> Trajectory:
    """An episode that is text and nothing else."""
    items = [
        EpisodeItem(role="user", content=question),
        EpisodeItem(role="assistant", content=reply, logprobs=[]),
    ]
    return Trajectory(episode=items, reward=reward)


async def test_text_is_trained_on_as_its_tokens_and_counted_apart(policy: Fixture, make_adapter: Fixture) -> None:
    """With the learner's own logprobs the ratios start at 1, so that a step is one of REINFORCE."""
    adapter = make_adapter(policy, retokenize=True, learning_rate=0.05)
    rows = [[said("hello", 1.0), said("world", 0.0)]]
    before = policy.weights()
    first = await run(adapter, TrajectoryCollection(trajectories=rows, run_id="text"))
    metrics = first.metadata["metrics"]
    assert (first.metadata["calls"], first.metadata["trained"]) == (2, 2)
    assert (metrics["retokenized_datums"], metrics["retokenized_calls"]) == (2, 2)
    assert metrics["ratio:mean"] == pytest.approx(1.0, abs=1e-5)
    assert any(not torch.equal(before[name], tensor) for name, tensor in policy.weights().items())


async def test_cross_entropy_learns_every_reply_alike(policy: Fixture, make_adapter: Fixture) -> None:
    """Rewards that are all equal would leave the other losses nothing to learn."""
    adapter = make_adapter(policy, retokenize=True, loss_fn="cross_entropy", learning_rate=0.05, passes=8)
    rows = [[said("hello", 0.0), said("hello", 0.0)]]
    ref = await adapter.submit(TrajectoryCollection(trajectories=rows, run_id="text"))
    status = await adapter.wait_until_complete(ref)
    assert (status.metadata["trained"], status.metadata["dropped"]) == (2, {})
    losses = [step["loss:sum"] for step in adapter.metrics_by_step(ref)]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 1.0


def test_settings_that_a_supervised_loss_has_no_use_for_are_refused(policy: Fixture, make_adapter: Fixture) -> None:
    with pytest.raises(ValueError, match="advantage, kl_beta would have no effect"):
        make_adapter(policy, loss_fn="cross_entropy", advantage="reward", kl_beta=0.1)
