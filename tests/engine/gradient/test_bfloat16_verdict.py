"""In bfloat16 the fast path is measured against float32, not against the rounding of the padded path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_tiny_family
from tiny import tiny_model

from nat_plugin_evsys.engine.gradient import fast_verdict as verdict
from nat_plugin_evsys.engine.gradient.fast_forward import FastForward
from nat_plugin_evsys.engine.gradient.fast_verdict import fast_forward
from nat_plugin_evsys.engine.model.float32_twin import float32_twin
from nat_plugin_evsys.engine.model.forward import OutputHead, hidden_rows
from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model, wrap_model
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.engine.model.targets import text_decoder
from nat_plugin_evsys.engine.tree.attention import attend_backward


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    path = save_tiny_family("qwen3_moe", tmp_path_factory.mktemp("bf16"))
    return load_base_model(str(path), device="cpu", dtype="bfloat16")


def test_the_twin_computes_in_float32(base: BaseModel) -> None:
    ids = [torch.arange(9), torch.arange(20, 24)]
    whole = load_base_model(base.name, device="cpu", dtype="bfloat16").model.float()
    with torch.no_grad(), applied(None):
        torch.testing.assert_close(
            hidden_rows(float32_twin(base.model), ids, base.device), hidden_rows(whole, ids, base.device)
        )
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


def test_nearer_to_float32_is_good_enough_and_further_is_not(base: BaseModel) -> None:
    fast, _ = fast_forward(base, OutputHead(base.model))
    assert isinstance(fast, FastForward)
    with torch.no_grad():
        found, plain, family = verdict._states_of_probe(base, fast, None)
    noise = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0)) * plain.float().std()
    rough = (plain + 0.2 * noise).to(plain.dtype)
    assert float((rough - found).abs().max() / rough.abs().max()) > 0.05
    assert verdict._half_mismatch(base, found, rough, family) == ""
    assert "off those of float32" in verdict._half_mismatch(base, rough, plain, family)
    few = found.clone()
    few[-3:] = few[:3]  # most rows right, some those of other tokens
    assert "off those of float32" in verdict._half_mismatch(base, few, plain, family)


def test_a_path_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    hybrid = load_base_model(str(save_tiny_family("granitemoehybrid", tmp_path)), device="cpu", dtype="bfloat16")
    assert "off those of float32" in fast_forward(hybrid, OutputHead(hybrid.model))[1]


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of what a GPU compiles, on the CPU."""
    monkeypatch.setattr(verdict, "_COMPILED_ON", ("cpu",))


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "llama4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_that_trains_is_accepted_where_kernels_are_compiled(
    compiling: None, family: str, dtype: torch.dtype
) -> None:
    rows: list[int] = []
    base = wrap_model(family, tiny_model(family).to(dtype), None)
    text_decoder(base.model).register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    fast, refusal = fast_forward(base, OutputHead(base.model))
    assert refusal == ""
    assert fast is not None
    assert fast.fused is not None or max(rows) >= 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fault", ["raises", "is not finite"])
def test_a_backward_kernel_of_many_rows_that_fails_is_found_at_load(
    compiling: None, dtype: torch.dtype, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_many_rows(grad: torch.Tensor, *args: Any) -> Any:
        if grad.shape[2] < 128:
            return attend_backward(grad, *args)
        if fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        return attend_backward(grad * float("nan"), *args)

    monkeypatch.setattr("nat_plugin_evsys.engine.tree.attention.attend_backward", of_many_rows)
    base = wrap_model("gemma3", tiny_model("gemma3").to(dtype), None)
    fast, refusal = fast_forward(base, OutputHead(base.model))
    assert fast is None
    assert ("shared memory" if fault == "raises" else "are not finite") in refusal
