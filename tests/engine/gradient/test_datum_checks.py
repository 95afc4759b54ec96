"""Malformed Datums and settings are refused before any compute, by name, and change nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tinker import types
from tiny import CONTEXT

from nat_plugin_evsys.errors import ConfigError, DataError


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    return types.Datum(types.ModelInput.from_ints(tokens), inputs)


def good(**changes: Any) -> types.Datum:
    inputs: dict[str, Any] = {"target_tokens": [2, 3], "logprobs": [-1.0, -2.0], "advantages": [0.0, 1.0], **changes}
    return datum([1, 2], **{key: value for key, value in inputs.items() if value is not None})


FLOAT_TOKENS = types.TensorData(data=[2.0, 3.0], dtype="float32", shape=[2])
WIDE = types.TensorData(data=[1.0, 0.5] * 2, dtype="float32", shape=[2, 2])
SHORT = {"model_input_of_3": datum([1, 2, 3], target_tokens=[2, 3], logprobs=[-1.0] * 2, advantages=[1.0] * 2)}
MASKED = {"sequence_ratio_mask": [0.0, 0.0]}

BAD: list[tuple[str, list[Any], dict[str, Any] | None, type[Exception], str]] = [
    ("importance_sampling", [], None, DataError, "empty list"),
    ("nope", [good()], None, DataError, "loss_fn 'nope'.*unknown.*cross_entropy"),
    ("stable_reinforce", [good()], None, DataError, "formula is not public"),
    ("custom", [good()], None, DataError, "forward_backward_custom"),
    ("importance_sampling", [good(), {"model_input": 1}], None, DataError, r"data\[1\] is a dict"),
    ("importance_sampling", [good(), good(advantages=None)], None, DataError, r"data\[1\].*lacks 'advantages'"),
    ("importance_sampling", [good(logprobs=None)], None, DataError, "lacks 'logprobs'"),
    ("importance_sampling", [good(target_tokens=None)], None, DataError, "lacks 'target_tokens'"),
    (
        "importance_sampling",
        [good(weights=[1.0, 1.0])],
        None,
        DataError,
        "'weights', which importance_sampling does not",
    ),
    ("cross_entropy", [good()], None, DataError, "which cross_entropy does not take"),
    ("dro", [good(clip_low_threshold=[0.1, 0.1])], None, DataError, "'clip_low_threshold'"),
    ("gspo", [good()], None, DataError, "lacks 'sequence_ratio_mask'"),
    ("gspo", [good(**MASKED)], None, DataError, "sequence_ratio_mask is zero everywhere"),
    ("importance_sampling", [good(advantages=[1.0])], None, DataError, r"advantages has shape \(1,\)"),
    ("importance_sampling", [good(logprobs=[[-1.0], [-2.0]])], None, DataError, r"logprobs has shape \(2, 1\)"),
    ("importance_sampling", list(SHORT.values()), None, DataError, r"shape \(2,\); model_input has 3 tokens"),
    ("importance_sampling", [good(target_tokens=[[2, 3], [3, 4]])], None, DataError, r"takes target_tokens of shape"),
    ("importance_sampling", [good(target_tokens=FLOAT_TOKENS)], None, DataError, "float32; give int64"),
    ("importance_sampling", [good(advantages=[0.0, math.nan])], None, DataError, r"advantages\[1\] is nan"),
    ("importance_sampling", [good(logprobs=[-math.inf, 0.0])], None, DataError, r"logprobs\[0\] is -inf"),
    ("importance_sampling", [good(target_tokens=[2, 200])], None, DataError, r"target_tokens\[1\] is 200.*0 to 199"),
    ("importance_sampling", [good(target_tokens=[-100, 3])], None, DataError, r"target_tokens\[0\] is -100"),
    ("cross_entropy", [datum([1, 500], target_tokens=[2, 3])], None, DataError, r"model_input\[1\] is 500"),
    ("cross_entropy", [datum([], target_tokens=[2])], None, DataError, "model_input is empty"),
    (
        "cross_entropy",
        [datum([1] * (CONTEXT + 1), target_tokens=[2] * (CONTEXT + 1))],
        None,
        DataError,
        f"{CONTEXT + 1} tokens.*context length is {CONTEXT}",
    ),
    (
        "cross_entropy",
        [datum([1], target_tokens=[[2, 3]], weights=[1.0])],
        None,
        DataError,
        r"weights has shape \(1,\)",
    ),
    (
        "cross_entropy",
        [datum([1, 2], target_tokens=[[2, 3], [3, 4]], temperature=WIDE)],
        None,
        DataError,
        r"temperature has shape \(2, 2\); with these target_tokens it must be \(2,\)",
    ),
    (
        "cross_entropy",
        [datum([1, 2], target_tokens=[[2, 300], [3, 4]])],
        None,
        DataError,
        r"target_tokens\[0, 1\] is 300",
    ),
    ("ppo", [good()], {"clip": 0.2}, ConfigError, "unknown key 'clip'.*clip_low_threshold"),
    ("ppo", [good()], {"clip_low_threshold": math.nan}, ConfigError, "clip_low_threshold is nan"),
    ("ppo", [good()], {"clip_low_threshold": -0.1}, ConfigError, "is -0.1"),
    ("ppo", [good()], {"clip_high_threshold": "1.2"}, ConfigError, "is '1.2'"),
    ("ppo", [good()], {"clip_low_threshold": 1.3}, ConfigError, "above"),
    ("ppo", [good(clip_low_threshold=[1.0, 2.0], clip_high_threshold=[1.5, 1.5])], None, DataError, "above.* at 1"),
    ("importance_sampling", [good()], {"beta": 0.1}, ConfigError, "takes no keys"),
    ("dro", [good()], {"beta": math.inf}, ConfigError, "beta is inf"),
]


@pytest.mark.parametrize(("loss_fn", "data", "config", "error", "message"), BAD)
def test_bad_input_is_refused_and_changes_nothing(
    loss_fn: str, data: list[Any], config: dict[str, Any] | None, error: type[Exception], message: str, trainable: Any
) -> None:
    model = trainable(perturbed=True)
    model.forward_backward([good()], "importance_sampling")
    gradient = {name: g.clone() for name, g in model.gradient.items()}
    weights = {name: p.detach().clone() for name, p in model.parameters.items()}
    with pytest.raises(error, match=message):
        model.forward_backward(data, loss_fn, config)
    assert all(torch.equal(model.gradient[name], g) for name, g in gradient.items())
    assert all(torch.equal(model.parameters[name], p) for name, p in weights.items())


def test_image_chunks_are_refused(trainable: Any) -> None:
    image = types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=2)
    data = [types.Datum(types.ModelInput(chunks=[image]), {"target_tokens": [1, 2]})]
    with pytest.raises(DataError, match=r"data\[0\]: model_input has a ImageChunk"):
        trainable().forward_backward(data, "cross_entropy")


def test_sparse_soft_targets_are_read(trainable: Any) -> None:
    dense_targets = torch.zeros(6, 8, dtype=torch.int64)
    dense_weights = torch.zeros(6, 8)
    dense_targets[:, 0], dense_weights[:, 0] = torch.arange(10, 16), 0.5
    inputs = {"target_tokens": dense_targets, "weights": dense_weights}
    sparse = types.Datum(types.ModelInput.from_ints([1] * 6), inputs)  # type: ignore[arg-type]
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    flat = datum([1] * 6, target_tokens=list(range(10, 16)), weights=[0.5] * 6)
    model = trainable()
    results = [model.forward([d], "cross_entropy").metrics["loss:sum"] for d in (sparse, flat)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda data, lps: (lps[0].sum(), {}), r"data\[1\]: the custom loss does not depend"),
        (lambda data, lps: (sum((lp * math.nan).sum() for lp in lps), {}), r"data\[0\].*inf or NaN"),
    ],
)
def test_bad_custom_losses(loss: Any, message: str, trainable: Any) -> None:
    model = trainable()
    with pytest.raises(DataError, match=message):
        model.forward_backward_custom([datum([1], target_tokens=[2]), datum([3], target_tokens=[4])], loss)
    assert model.gradient is None


def test_an_error_of_the_custom_loss_itself_comes_through(trainable: Any) -> None:
    def broken(data: Any, logprobs: Any) -> Any:
        raise KeyError("mine")

    model = trainable()
    with pytest.raises(KeyError, match="mine"):
        model.forward_backward_custom([datum([1], target_tokens=[2])], broken)
    assert model.gradient is None
