"""The warm start on a real policy: both algorithms train the adapter and publish it."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tinker import types

from nat_plugin_evsys.backends.base import Architecture
from nat_plugin_evsys.config import EvsysPolicyConfig, WarmStartConfig
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.finetuning.warm_start import load_demonstrations, warm_start
from nat_plugin_evsys.policy.policy import Policy


def demonstration(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    path = tmp_path / "demonstrations.json"
    path.write_text(json.dumps([demonstration("My wifi is late.", "network"), demonstration("My login?", "accounts")]))
    return path


@pytest.fixture
async def policy(tmp_path: Path) -> AsyncIterator[Policy]:
    policy = Policy.of(EvsysPolicyConfig(base_model="builtin/tiny", output_dir=tmp_path, lora_rank=4, max_tokens=4))
    try:
        policy.begin_training()
        await policy.ensure_loaded()
        yield policy
    finally:
        await policy.close()


@pytest.mark.parametrize("algorithm", [{"algorithm": "sft"}, {"algorithm": "sdft", "candidates": 32}])
async def test_warm_start_trains_and_publishes(algorithm: dict[str, Any], policy: Policy, demonstrations: Path) -> None:
    before, served = policy.version, policy.endpoint.base_url
    seen = []
    config = WarmStartConfig(demonstrations=demonstrations, epochs=6, batch_size=2, learning_rate=5e-3, **algorithm)
    metrics = await warm_start(policy, config, seen.append)
    assert metrics["steps"] == len(seen) == 6
    assert math.isfinite(metrics["loss_first"])
    assert metrics["loss_last"] < metrics["loss_first"]
    assert policy.version > before
    assert policy.endpoint.base_url == served
    assert list(policy.backend.checkpoint_dir.rglob("warm-start*")) == []


def test_candidates_are_refused_where_no_kl_is_taken_over_them() -> None:
    with pytest.raises(ValueError, match="candidates has no effect with algorithm `sft`; remove it"):
        WarmStartConfig.model_validate({"demonstrations": "rows.json", "candidates": 64})


async def test_a_rate_that_is_not_set_is_that_of_the_models_width(
    policy: Policy, demonstrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy.backend, "get_architecture", lambda: Architecture("llama", 4096))
    seen: list[Any] = []
    await warm_start(policy, WarmStartConfig(demonstrations=demonstrations), seen.append)
    assert seen[0].learning_rate == 0.00029


async def test_the_step_after_it_is_the_first_of_its_optimizer(policy: Policy, demonstrations: Path) -> None:
    tokens = policy.renderer.tokenizer.encode("My login? payroll", add_special_tokens=False)
    punished = types.Datum(
        types.ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": [-1.0] * (len(tokens) - 1),
            "advantages": [-1e-3] * (len(tokens) - 1),
        },
    )
    config = WarmStartConfig(demonstrations=demonstrations, epochs=6, batch_size=2, learning_rate=5e-3)
    await warm_start(policy, config, lambda step: None)
    weights = await policy.backend.save_for_sampler("demonstrated")
    moved = []
    for start in (None, weights):
        if start is not None:
            await policy.backend.load_state(start)
        await policy.backend.forward_backward_async([punished], loss_fn="importance_sampling")
        await policy.backend.optim_step_async(types.AdamParams(learning_rate=1e-3))
        after = await policy.backend.forward_async([punished], loss_fn="importance_sampling")
        moved.append(after.loss_fn_outputs[0]["logprobs"].tolist())
    assert moved[0] == pytest.approx(moved[1], abs=1e-5)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("form", ["array", "lines"])
def test_demonstrations_are_read_as_they_were_written(mark: str, form: str, tmp_path: Path) -> None:
    """With a byte-order mark, and with what JSON does not escape but `str.splitlines` takes for the end of a line."""
    rows = [demonstration("a\x85\u2028\u2029b", "c"), demonstration("d", "e")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "demonstrations.json"
    path.write_text(mark + (f"[{','.join(lines)}]" if form == "array" else "\r\n\n".join(lines)), encoding="utf-8")
    assert load_demonstrations(path) == rows


@pytest.mark.parametrize(
    ("text", "error", "wanted"),
    [
        ("[]", DataError, "has no demonstrations"),
        ("{nope", DataError, "neither a JSON array nor JSON lines"),
        ('[{"messages": [{"role": "user", "content": "hi"}]}]', DataError, "demonstration 1 has no"),
        ('{"messages": "hi"}', DataError, r"demonstrations\.json: demonstration 1 has no `messages`"),
        ('[{"messages": [{"role": "assistant"}]}, "x"]', DataError, "demonstration 2 has no `messages`"),
        ('{"messages": ["x"]}', DataError, "demonstration 1 has no `messages`"),
        ('{"messages": {"role": "assistant"}}', DataError, "demonstration 1 has no `messages`"),
        ('{"messages": [{"role": "assistant"}], "tools": "x"}', DataError, "demonstration 1: `tools` is not a list"),
        ('{"messages": [{"role": "assistant"}], "tools": 5}', DataError, "demonstration 1: `tools` is not a list"),
    ],
)
def test_bad_demonstrations(text: str, error: type[Exception], wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.json"
    path.write_text(text)
    with pytest.raises(error, match=wanted):
        load_demonstrations(path)


def test_demonstrations_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.json"
    path.write_text("[]", encoding="utf-16")
    with pytest.raises(DataError, match=rf"{path} cannot be read: .*write it as UTF-8"):
        load_demonstrations(path)


def test_missing_demonstrations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="check the path"):
        load_demonstrations(tmp_path / "nowhere.json")
