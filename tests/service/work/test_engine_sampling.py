"""Sampling through the engine of the server: what comes back, from which weights, and what is refused."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_operations import SESSION, EngineHarness, ModelOperations, sample_operation
from random_datums import byte_datums
from samples import assert_same_samples
from tinker import types
from tiny import save_byte_model
from transformers import AutoModelForCausalLM

from nat_plugin_evsys.engine.checkpoints import set_expiry
from nat_plugin_evsys.errors import CheckpointError, ModelError, StoreError
from nat_plugin_evsys.service.wire.kinds import OperationKind
from nat_plugin_evsys.service.work import samplers

PROMPT = list(b"how are you?")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_byte_model(tmp_path_factory.mktemp("engine") / "tiny"))


@pytest.fixture
def harness(tmp_path: Path, base: str) -> Iterator[EngineHarness]:
    with EngineHarness(tmp_path / "store", [base]) as made:
        yield made


def train(harness: EngineHarness, model: ModelOperations, base: str) -> None:
    """A step that changes what is sampled."""
    if harness.store.model(model.model_id) is None:
        harness.run(model.create(base))
    harness.run(model.forward_backward(byte_datums(model.next_seq)), model.optim_step(0.1))


def test_everything_that_can_be_asked_for(harness: EngineHarness, base: str) -> None:
    sampler = harness.add_sampler(0, base)
    (result,) = harness.run(
        sample_operation(
            sampler,
            1,
            PROMPT,
            max_tokens=5,
            seed=3,
            stop=[],
            num_samples=4,
            prompt_logprobs=True,
            topk_prompt_logprobs=2,
            topk_sample_logprobs=3,
        )
    )
    assert [len(each.tokens) for each in result.sequences] == [5] * 4
    assert len({tuple(each.tokens) for each in result.sequences}) == 4
    assert all(each.stop_reason == "length" for each in result.sequences)
    assert np.isnan(result.prompt_logprobs_np[0])
    assert np.isfinite(result.prompt_logprobs_np[1:]).all()
    assert result.topk_prompt_logprobs_np.token_ids.shape == (len(PROMPT), 2)
    assert result.sequences[0].topk_logprobs_np.token_ids.shape == (5, 3)


def test_a_seed_gives_the_same_set_and_no_seed_another(harness: EngineHarness, base: str) -> None:
    sampler = harness.add_sampler(0, base)
    model = AutoModelForCausalLM.from_pretrained(base)

    @torch.no_grad()
    def logits_of(tokens: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([tokens])).logits[0]

    def sequences(seq: int, seed: int | None) -> list[Any]:
        options = {"max_tokens": 8, "stop": [], "num_samples": 3, "seed": seed}
        return list(harness.run(sample_operation(sampler, seq, PROMPT, **options))[0].sequences)

    params = types.SamplingParams(max_tokens=8, stop=[], seed=7)
    assert_same_samples(sequences(1, 7), sequences(2, 7), PROMPT, params, logits_of)
    assert [each.tokens for each in sequences(3, None)] != [each.tokens for each in sequences(4, None)]


def test_only_the_last_prompt_logprobs(harness: EngineHarness, base: str) -> None:
    sampler = harness.add_sampler(0, base)
    asked = {"max_tokens": 1, "prompt_logprobs": True, "prompt_logprobs_last_n": 3}
    (result,) = harness.run(sample_operation(sampler, 1, PROMPT, **asked))
    assert np.isnan(result.prompt_logprobs_np[:-3]).all()
    assert np.isfinite(result.prompt_logprobs_np[-3:]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record_stability_info": True}, "record_stability_info is not offered"),
        (
            {"target_prompt_logprobs": {"data": [1], "dtype": "int64"}},
            "must be int64 of shape [11, K]",
        ),
        ({"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}}, "'image' is not offered"),
        ({"temperature": -1}, "temperature must be"),
        ({"stop": ""}, "empty string"),
        ({"max_tokens": 0}, "max_tokens must be positive"),
        ({"num_samples": 10**9}, "num_samples"),
        ({"prompt": {"chunks": []}}, "the prompt is empty"),
        ({"prompt": {"chunks": [{"tokens": [1] * 300}]}}, "context length is 256"),
    ],
)
def test_refused_by_name(harness: EngineHarness, base: str, options: dict[str, object], message: str) -> None:
    sampler = harness.add_sampler(0, base)
    good = {"max_tokens": 2, "stop": []}
    bad, fine = harness.run(
        sample_operation(sampler, 1, PROMPT, **{**good, **options}), sample_operation(sampler, 2, PROMPT, **good)
    )
    assert message in bad["error"]
    assert bad["category"] == "user"
    assert len(fine.sequences[0].tokens) == 2


def test_named_and_ephemeral_weights_are_those_of_their_step(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    train(harness, model, base)
    (named,) = harness.run(model.save("one", OperationKind.SAVE_WEIGHTS_FOR_SAMPLER))
    (ephemeral,) = harness.run(model.save_ephemeral(1))
    assert ephemeral["sampling_session_id"] == f"{SESSION}:sample:1"
    harness.add_sampler(2, base, named["path"])
    train(harness, model, base)
    harness.run(model.save_ephemeral(3))
    asked = {"max_tokens": 1, "prompt_logprobs": True}
    logprobs = [
        harness.run(sample_operation(f"{SESSION}:sample:{number}", 1, PROMPT, **asked))[0].prompt_logprobs_np[1:]
        for number in (1, 2, 3)
    ]
    assert (logprobs[0] == logprobs[1]).all()
    assert np.abs(logprobs[0] - logprobs[2]).max() > 1e-2
    # The trainer's own logprobs at these weights.
    (forward,) = harness.run(model.forward_backward([_datum()], forward_only=True))
    np.testing.assert_allclose(logprobs[2], forward.loss_fn_outputs[0]["logprobs"].tolist(), atol=1e-4)


def test_an_overwritten_checkpoint_does_not_change_an_open_session(
    harness: EngineHarness, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelOperations()
    train(harness, model, base)
    kind = OperationKind.SAVE_WEIGHTS_FOR_SAMPLER
    path = harness.run(model.save("one", kind))[0]["path"]
    sampler = harness.add_sampler(1, base, path)
    asked = {"max_tokens": 1, "prompt_logprobs": True}
    (before,) = harness.run(sample_operation(sampler, 1, PROMPT, **asked))
    train(harness, model, base)
    harness.run(model.save("one", kind, overwrite=True))
    (after,) = harness.run(sample_operation(sampler, 2, PROMPT, **asked))
    assert (before.prompt_logprobs_np[1:] == after.prompt_logprobs_np[1:]).all()
    harness.engine._samplers.close_session(SESSION)
    (refused,) = harness.run(sample_operation(sampler, 3, PROMPT, **asked))
    assert "was overwritten" in refused["error"]


def test_an_open_session_ends_with_the_right_to_its_checkpoint(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    train(harness, model, base)
    paths = [harness.run(model.save(n, OperationKind.SAVE_WEIGHTS_FOR_SAMPLER))[0]["path"] for n in ("one", "two")]
    own, expiring = harness.add_sampler(1, base, paths[0]), harness.add_sampler(2, base, paths[1])
    another = harness.add_sampler(3, base, paths[0], owner="another")
    harness.store.publish(paths[0], "local").result()
    seqs = itertools.count()

    def error(sampler: str, owner: str = "local") -> str | None:
        (result,) = harness.run(sample_operation(sampler, next(seqs), PROMPT, owner, max_tokens=1))
        return result["error"] if isinstance(result, dict) else None

    assert [error(own), error(expiring), error(another, "another")] == [None] * 3
    harness.store.unpublish(paths[0]).result()
    assert "does not exist" in (error(another, "another") or "")
    assert error(own) is None
    set_expiry(harness.checkpoints.resolve(paths[1]), time.time() - 1)
    assert "expired at" in (error(expiring) or "")
    harness.checkpoints.delete(paths[0])
    assert "does not exist" in (error(own) or "")


def test_overwriting_a_published_checkpoint_shows_the_new_weights_to_nobody(
    harness: EngineHarness, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kind = ModelOperations(), OperationKind.SAVE_WEIGHTS_FOR_SAMPLER
    train(harness, model, base)
    path = harness.run(model.save("one", kind))[0]["path"]
    harness.store.publish(path, "local").result()
    (refused,) = harness.run(model.save("one", kind))
    assert "choose another name or pass overwrite=True" in refused["error"]
    assert harness.store.is_published(path)

    def full_disk(_: str) -> Future[None]:
        failed: Future[None] = Future()
        failed.set_exception(StoreError("the disk is full"))
        return failed

    train(harness, model, base)
    with monkeypatch.context() as patched:
        patched.setattr(harness.store, "unpublish", full_disk)
        (failed,) = harness.run(model.save("one", kind, overwrite=True))
    assert "the disk is full" in failed["error"]
    assert harness.engine.sampling_client(path, "another")[0].policy_version == 1
    harness.run(model.save("one", kind, overwrite=True))
    with pytest.raises(CheckpointError, match="does not exist"):
        harness.engine.sampling_client(path, "another")


def test_inflight_sessions_follow_what_their_model_publishes(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract of ``tinker.types.SamplingClientKind``; here a request runs whole on the weights it began with."""
    monkeypatch.setattr(samplers, "KEPT_EPHEMERAL", 1)
    model, other = ModelOperations(0), ModelOperations(1)

    def logprobs(number: int, seq: int) -> Any:
        asked = sample_operation(f"{SESSION}:sample:{number}", seq, PROMPT, max_tokens=1, prompt_logprobs=True)
        return harness.run(asked)[0].prompt_logprobs_np[1:]

    with EngineHarness(tmp_path / "store", [base]) as harness:
        for each in (model, other, other):
            train(harness, each, base)
        snapshot, first, others = harness.run(
            model.save_ephemeral(1), model.save_ephemeral(2, "inflight"), other.save_ephemeral(3, "inflight")
        )
        assert [each["sampling_session_id"][-1] for each in (snapshot, first, others)] == ["1", "2", "3"]
        published = logprobs(1, 1)
        assert (logprobs(2, 1) == published).all()
        elsewhere = logprobs(3, 1)
        assert np.abs(elsewhere - published).max() > 1e-2
        train(harness, model, base)
        assert (logprobs(2, 2) == published).all(), "weights that nobody published"
        harness.run(model.save_ephemeral(4, "inflight"))
        newest = logprobs(4, 1)
        assert np.abs(newest - published).max() > 1e-2
        assert (logprobs(2, 3) == newest).all()
        assert (logprobs(1, 2) == published).all()
        assert (logprobs(3, 2) == elsewhere).all()
        assert len(harness.engine._samplers._clients) == 3, "what was replaced is freed"
    with EngineHarness(tmp_path / "store", [base]) as harness:  # after a restart too
        np.testing.assert_allclose(logprobs(2, 4), newest, atol=1e-6)
        np.testing.assert_allclose(logprobs(1, 3), published, atol=1e-6)


def test_memory_is_bounded_and_weights_come_back(
    harness: EngineHarness, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness.engine._samplers._clients, "_memory_bytes", 1)
    model = ModelOperations()
    asked = {"max_tokens": 1, "prompt_logprobs": True}
    first = []
    for number in range(3):
        train(harness, model, base)
        harness.run(model.save_ephemeral(number))
        sampler = f"{SESSION}:sample:{number}"
        first.append(harness.run(sample_operation(sampler, 1, PROMPT, **asked))[0].prompt_logprobs_np[1:])
        assert len(harness.engine._samplers._clients) == 1
    for number in range(3):
        (again,) = harness.run(sample_operation(f"{SESSION}:sample:{number}", 2, PROMPT, **asked))
        np.testing.assert_allclose(again.prompt_logprobs_np[1:], first[number], atol=1e-6)


def test_the_oldest_ephemeral_weights_are_dropped_by_name(
    harness: EngineHarness, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "KEPT_EPHEMERAL", 2)
    model = ModelOperations()
    for number in range(4):
        train(harness, model, base)
        harness.run(model.save_ephemeral(number))
    results = harness.run(*(sample_operation(f"{SESSION}:sample:{n}", 1, PROMPT, max_tokens=1) for n in range(4)))
    for refused in results[:2]:
        assert "has ended: the newest 2 unnamed weights" in refused["error"]
    assert all(len(each.sequences) == 1 for each in results[2:])
    assert len(list((harness.store.root / "samplers" / model.model_id).iterdir())) == 2
    (taken,) = harness.run(model.save_ephemeral(3))
    assert "sampling_session_seq_id 3 is taken" in taken["error"]


def test_a_cancelled_request_ends_and_the_next_one_runs(harness: EngineHarness, base: str) -> None:
    sampler = harness.add_sampler(0, base)
    long = sample_operation(sampler, 1, PROMPT, max_tokens=240, stop=[], num_samples=64)
    harness.put(long)
    harness.engine.cancel(long.request_id)
    harness.engine.cancel("unknown")
    (outcome,) = harness.wait(long.request_id)
    assert b"cancelled" in outcome.body
    (result,) = harness.run(sample_operation(sampler, 2, PROMPT, max_tokens=2))
    assert len(result.sequences) == 1


def test_models_by_name(harness: EngineHarness, base: str) -> None:
    model = ModelOperations()
    train(harness, model, base)
    assert harness.engine.sampling_client(base, "anybody")[0].policy_version == -1
    with pytest.raises(ModelError, match="there is no model"):
        harness.engine.sampling_client(model.model_id, "local")
    kind = OperationKind.SAVE_WEIGHTS_FOR_SAMPLER
    path = harness.run(model.save("one", kind))[0]["path"]
    train(harness, model, base)
    harness.run(model.save("two", kind))
    assert harness.engine.sampling_client(path, "local")[0].policy_version == 1
    assert harness.engine.sampling_client(model.model_id, "local")[0].policy_version == 2
    for name in (path, f"tinker://{model.model_id}/sampler_weights/..", "tinker://x"):
        with pytest.raises(CheckpointError):
            harness.engine.sampling_client(name, "another")
    with pytest.raises(ModelError, match="there is no model"):
        harness.engine.sampling_client(model.model_id, "another")
    harness.store.publish(path, "local").result()
    assert harness.engine.sampling_client(path, "another")[0].policy_version == 1


def test_unfinished_samples_are_run_by_the_next_server(tmp_path: Path, base: str) -> None:
    with EngineHarness(tmp_path / "store", [base]) as harness:
        sampler = harness.add_sampler(0, base)
        waiting = sample_operation(sampler, 1, PROMPT, max_tokens=240, stop=[], num_samples=64, seed=1)
        harness.put(waiting)
        harness.close(timeout=0.0)
    with EngineHarness(tmp_path / "store", [base]) as harness:
        (outcome,) = harness.wait(waiting.request_id)
        assert not outcome.failed


def _datum() -> object:
    return types.Datum(types.ModelInput.from_ints(PROMPT[:-1]), {"target_tokens": PROMPT[1:]})
