"""The default path against the plain one: logprobs, losses, metrics and gradients, on random tries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tinker import types
from tiny import perturb, tiny_model

from nat_plugin_evsys.engine.gradient.trainable import TrainableModel
from nat_plugin_evsys.engine.model.identity import model_identity
from nat_plugin_evsys.engine.model.loading import wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied

TOLERANCE = 1e-5
ROUNDING = 2e-7


def assert_equal_steps(
    plain: TrainableModel, fast: TrainableModel, data: list[types.Datum], loss_fn: str
) -> tuple[types.ForwardBackwardOutput, types.ForwardBackwardOutput]:
    expected, found = plain.forward_backward(data, loss_fn), fast.forward_backward(data, loss_fn)
    for a, b in zip(found.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
        for key in ("logprobs", "elementwise_loss"):
            torch.testing.assert_close(a[key].to_torch(), b[key].to_torch(), rtol=1e-5, atol=1e-5)
    assert_close_gradients(fast, plain)
    terms = sum(float(o["elementwise_loss"].to_torch().abs().sum()) for o in expected.loss_fn_outputs)
    assert abs(found.metrics["loss:sum"] - expected.metrics["loss:sum"]) <= TOLERANCE * max(terms, 1.0)
    for key in ("tokens:sum", "entropy:mean", "ratio:mean", "ratio:max", "kl_v2:mean", "weights:sum"):
        if key in expected.metrics:
            assert found.metrics[key] == pytest.approx(expected.metrics[key], rel=1e-4, abs=1e-5)
    plain.discard_gradient()
    fast.discard_gradient()
    return expected, found


def assert_close_gradients(fast: TrainableModel, plain: TrainableModel) -> None:
    assert fast.gradient is not None
    assert plain.gradient is not None
    largest = max(float(g.abs().max()) for g in plain.gradient.values())
    for name, expected in plain.gradient.items():
        # A gradient that cancels to nothing (queries of a single token) is rounding error, in both paths.
        allowed = TOLERANCE * float(expected.abs().max()) + ROUNDING * largest
        assert float((fast.gradient[name] - expected).abs().max()) <= allowed, name


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "llama3_rope", "gemma3", "qwen3_moe", "mistral"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_tries(family: str, seed: int, pair: Any, make_datums: Any) -> None:
    longest = 16 if family in ("gemma3", "mistral") else 24
    data = make_datums(seed, "importance_sampling", longest=longest)
    _, found = assert_equal_steps(*pair(family), data, "importance_sampling")
    assert found.metrics["plain_path_tokens:sum"] == 0


@pytest.mark.parametrize("loss_fn", ["cross_entropy", "ppo", "cispo", "dro", "gspo"])
@pytest.mark.parametrize("budget", [None, 20])
def test_every_loss_whole_and_in_packs(loss_fn: str, budget: int | None, pair: Any, make_datums: Any) -> None:
    plain, fast = pair("qwen3", token_budget=budget)
    batches = 0.0
    for seed in range(3):
        _, found = assert_equal_steps(plain, fast, make_datums(seed, loss_fn), loss_fn)
        batches += found.metrics["micro_batches:sum"]
    assert (batches > 3) == (budget is not None)


@pytest.mark.parametrize("lora", [{"train_mlp": False}, {"train_attn": False}, {"train_unembed": True}])
def test_every_choice_of_targets(lora: dict[str, bool], pair: Any, make_datums: Any) -> None:
    assert_equal_steps(*pair("qwen2", **lora), make_datums(5), "ppo")


@pytest.mark.parametrize("family", ["gemma3_soft_cap", "granite"])
def test_logits_changed_after_the_head(family: str, pair: Any, make_datums: Any) -> None:
    _, found = assert_equal_steps(*pair(family), make_datums(3, longest=16), "ppo")
    assert found.metrics["plain_path_tokens:sum"] == 0


def test_equal_rows_with_unequal_advantages_add_up(pair: Any) -> None:
    """Two Datums of the same tokens: the gradient is that of one Datum with the sum of the advantages."""
    tokens, targets = [5, 6, 7, 8], [6, 7, 8, 9]

    def datum(advantages: list[float]) -> types.Datum:
        inputs = {"target_tokens": targets, "logprobs": [-4.0] * 4, "advantages": advantages}
        return types.Datum(types.ModelInput.from_ints(tokens), inputs)

    one, two = pair("qwen3")[1], pair("qwen3")[1]
    one.forward_backward([datum([0.0, 1.5, -0.25, 2.0])], "importance_sampling")
    output = two.forward_backward([datum([0.0, 1.0, 0.75, -1.0]), datum([0.0, 0.5, -1.0, 3.0])], "importance_sampling")
    assert_close_gradients(two, one)
    assert output.metrics["computed_tokens:sum"] == 4
    assert output.metrics["datum_tokens:sum"] == 8


def test_soft_targets(pair: Any, make_datums: Any) -> None:
    plain, fast = pair("llama")
    generator = torch.Generator().manual_seed(0)
    data = []
    for width, datum in zip((3, 1, 2, 3), make_datums(8, count=4), strict=True):
        n = datum.model_input.length
        targets = torch.randint(0, 90, (n, width), generator=generator)
        weights = torch.rand(n, width, generator=generator)
        inputs: Any = {
            "target_tokens": types.TensorData.from_torch(targets),
            "weights": types.TensorData.from_torch(weights),
        }
        data.append(types.Datum(datum.model_input, inputs))
    assert_equal_steps(plain, fast, data, "cross_entropy")


def test_only_distinct_tokens_are_computed(pair: Any, make_datums: Any) -> None:
    data = make_datums(4)
    prefixes = {tuple(d.model_input.to_ints()[: i + 1]) for d in data for i in range(d.model_input.length)}
    output = pair("qwen3")[1].forward_backward(data, "ppo")
    assert output.metrics["computed_tokens:sum"] == len(prefixes)


def test_without_untrained_logprobs_the_rest_is_the_same(pair: Any, make_datums: Any) -> None:
    for seed, loss_fn in enumerate(["ppo", "gspo", "cross_entropy"]):
        whole, lean = pair("qwen3")[1], pair("qwen3")[1]
        lean.untrained_logprobs = False
        data = make_datums(seed, loss_fn)
        expected, found = whole.forward_backward(data, loss_fn), lean.forward_backward(data, loss_fn)
        assert_close_gradients(lean, whole)
        terms = sum(float(o["elementwise_loss"].to_torch().abs().sum()) for o in expected.loss_fn_outputs)
        assert abs(found.metrics["loss:sum"] - expected.metrics["loss:sum"]) <= TOLERANCE * max(terms, 1.0)
        assert found.metrics["computed_tokens:sum"] <= expected.metrics["computed_tokens:sum"]
        key = "weights" if loss_fn == "cross_entropy" else "advantages"
        for datum, a, b in zip(data, found.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
            trained = datum.loss_fn_inputs[key].to_torch() != 0
            lp = a["logprobs"].to_torch()
            torch.testing.assert_close(lp[trained], b["logprobs"].to_torch()[trained], rtol=1e-5, atol=1e-5)
            if loss_fn != "gspo":
                assert not lp[~trained].any()
        torch.testing.assert_close(
            lean.forward(data, loss_fn).loss_fn_outputs[0]["logprobs"].to_torch(),
            expected.loss_fn_outputs[0]["logprobs"].to_torch(),
        )


def test_nothing_trained_gives_no_gradient(pair: Any, make_datums: Any) -> None:
    data = make_datums(1, "cross_entropy")
    for datum in data:
        datum.loss_fn_inputs["weights"] = types.TensorData.from_torch(torch.zeros(datum.model_input.length))
    for lean in (False, True):
        model = pair("qwen3")[1]
        model.untrained_logprobs = not lean
        output = model.forward_backward(data, "cross_entropy")
        assert output.metrics["loss:sum"] == 0
        assert all(not g.any() for g in model.gradient.values())


@pytest.mark.parametrize(
    ("family", "attention", "why"),
    [("gemma2", None, "attention"), ("dynamic_rope", None, "rotary"), ("llama", "eager", "attention")],
)
def test_other_models_take_the_plain_path_and_say_so(
    family: str, attention: str | None, why: str, pair: Any, make_datums: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain, fast = pair(family, attention=attention)
    data = make_datums(2)
    _, found = assert_equal_steps(plain, fast, data, "ppo")
    assert found.metrics["plain_path_tokens:sum"] == found.metrics["datum_tokens:sum"]
    assert [r for r in caplog.records if why in r.message and "padded" in r.message]


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_sequences_longer_than_a_window_take_the_plain_path(family: str, pair: Any, make_datums: Any) -> None:
    plain, fast = pair(family)
    data = make_datums(6, longest=40, count=9)
    long = sum(d.model_input.length for d in data if d.model_input.length > 16)
    assert 0 < long < sum(d.model_input.length for d in data)
    _, found = assert_equal_steps(plain, fast, data, "ppo")
    assert found.metrics["plain_path_tokens:sum"] == long


@pytest.mark.parametrize(
    ("family", "path"),
    [("gemma2", "plain"), ("gemma3_soft_cap", "plain"), ("gemma3_soft_cap", "auto"), ("granite", "auto")],
)
def test_the_temperature_divides_the_models_own_logits(family: str, path: str, pair: Any, make_datums: Any) -> None:
    """After a soft cap, if there is one: as the sampler does."""
    model = pair(family)[path == "auto"]
    data = make_datums(2, "cross_entropy", longest=16)
    for i, datum in enumerate(data):
        temperature = torch.full((datum.model_input.length,), 0.6 + 0.3 * (i % 3))
        datum.loss_fn_inputs["temperature"] = types.TensorData.from_torch(temperature)
    output = model.forward(data, "cross_entropy")
    for i, (datum, found) in enumerate(zip(data, output.loss_fn_outputs, strict=True)):
        with torch.no_grad(), applied(model.adapter):
            logits = model.base.model(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0]
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        expected = (logits / (0.6 + 0.3 * (i % 3))).log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found["logprobs"].to_torch(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [None, 200])
def test_queries_that_are_scaled_by_their_row_are_those_of_their_position(budget: int | None, make_datums: Any) -> None:
    """Llama 4 without rotary embedding, from ``floor_scale`` on; a sequence that is longer is a pack of its own."""
    model = tiny_model("llama4", attn_temperature_tuning=True, floor_scale=32, attn_scale=0.5)
    base = wrap_model("llama4", model, None)
    adapters = [perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0), seed=2) for _ in range(2)]
    plain, fast = (
        TrainableModel(base, adapter, token_budget=budget, path=path)
        for adapter, path in zip(adapters, ("plain", "auto"), strict=True)
    )
    data = make_datums(6, longest=48, count=12)
    assert any(d.model_input.length > 32 for d in data)
    _, found = assert_equal_steps(plain, fast, data, "ppo")
    assert found.metrics["plain_path_tokens:sum"] == 0
    assert found.metrics["micro_batches:sum"] > 2


def test_the_prediction_is_what_is_kept(pair: Any, make_datums: Any) -> None:
    fast = pair("qwen3")[1]
    metrics = fast.forward_backward(make_datums(9, count=30, longest=60), "ppo").metrics
    kept = metrics["activation_bytes:max"]
    assert metrics["activation_predicted_bytes:max"] == pytest.approx(kept, rel=0.15)


def torch_attends_in_bfloat16() -> bool:
    """False on a processor with AMX where ATEN_CPU_CAPABILITY hides it: torch's own kernel asks the processor."""
    heads = torch.zeros(1, 4, 64, 8, dtype=torch.bfloat16)
    try:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads, 0.0, True)
    except RuntimeError as error:
        if "pack_vnni2" not in str(error):
            raise
        return False
    return True


@pytest.mark.skipif(not torch_attends_in_bfloat16(), reason="torch cannot attend in bfloat16 under this setting")
def test_bfloat16_is_as_near_as_the_plain_path(pair: Any, make_datums: Any) -> None:
    """bf16 keeps 8 bits: both paths are some percent off the fp32 gradient, the fast one no further than the plain."""
    exact = pair("qwen3")[0]
    exact.forward_backward(make_datums(7), "ppo")
    errors = []
    for model in pair("qwen3", dtype=torch.bfloat16):
        output = model.forward_backward(make_datums(7), "ppo")
        whole = torch.cat([g.flatten() for g in model.gradient.values()])
        expected = torch.cat([g.flatten() for g in exact.gradient.values()])
        errors.append(float((whole - expected).norm() / expected.norm()))
    assert output.metrics["plain_path_tokens:sum"] == 0
    assert errors[1] < 1.3 * errors[0] < 0.3


def test_the_model_is_what_it_was(base_of: Any, pair: Any) -> None:
    """Installing tree attention changes neither the identity that checkpoints record nor other forward passes."""
    pair("qwen2")
    model = base_of("qwen2").model
    assert model.config._attn_implementation == "evsys_tree"
    assert model_identity(model) == base_of("qwen2").identity
    ids = torch.arange(40).view(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
        before = copy.deepcopy(model)
        before.config._attn_implementation = "sdpa"
        assert torch.equal(found, before(input_ids=ids, attention_mask=mask).logits)
