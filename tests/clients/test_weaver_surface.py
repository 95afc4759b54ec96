"""Weaver's forms: results that are mappings, ``datums=``, ``api_key=``, ``wait=True``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nat_plugin_evsys import ServiceClient, TrainingClient, types

ADAM = types.AdamParams(learning_rate=1e-3)


def test_a_key_is_taken(tmp_path: Path, tiny_model: str) -> None:
    with ServiceClient(api_key="your-api-key", store=tmp_path) as service:
        assert service.create_model(base_model=tiny_model, lora_config={"rank": 2}).get_info().lora_rank == 2


@pytest.mark.parametrize("wait", [True, False])
def test_a_training_result_is_a_mapping(client: TrainingClient, datums: Any, wait: bool) -> None:
    """Of the future and of what it gives."""
    future = client.forward_backward(datums=datums(0), loss_fn="cross_entropy", wait=wait)
    for result in (future, future.result()):
        assert "result" in result
        assert "nothing" not in result
        assert list(result) == list(result.keys())
        assert next(iter(result)) == "result"
        assert len(result) == len(list(result))
        assert dict(result.items()) == {key: result[key] for key in result}
        assert list(result.values()) == [result[key] for key in result]
        assert sorted(result["result"]) == ["loss_fn_outputs", "metrics"]
        assert result["result"]["metrics"]["loss"] > 0
        assert result.get("nothing", 3) == 3
    assert isinstance(future.result(), Mapping)
    assert dict(future.result())["metrics"] == future.result().metrics

    step = client.optim_step(ADAM, wait=wait)
    assert "result" in step
    assert step["result"]["metrics"]["grad_norm"] == step.result().metrics["grad_norm"] > 0  # type: ignore[index]
    assert isinstance(step.result(), Mapping)


def test_a_sample_is_a_mapping_all_the_way_down(client: TrainingClient) -> None:
    sampling = client.save_weights_and_get_sampling_client(name="my-model")
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    result = sampling.sample(prompt=types.ModelInput.from_ints([1, 2]), sampling_params=params, num_samples=2)
    assert "sequences" in result
    assert result["sequences"][0]["text"] == result.result().sequences[0].text
    for sequence in result["sequences"]:
        assert isinstance(sequence, Mapping)
        assert list(sequence) == ["tokens", "text", "logprobs", "stop_reason"]
        assert len(sequence["tokens"]) == len(sequence["logprobs"])
