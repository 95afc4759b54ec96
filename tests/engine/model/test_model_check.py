"""What loads is right or says so: one family of each kind that once went wrong without a word."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import save_tiny_family

from nat_plugin_evsys.engine.model.loading import load_base_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.model.peft_check import peft_problem, say_if_peft_differs
from nat_plugin_evsys.engine.sampling import decoding_check
from nat_plugin_evsys.runtime.model_check import check_model

KINDS = {
    "gpt2": "fast",  # Conv1D
    "llama4_text": "one sequence at a time",  # adds in place to what a layer returns; calls itself its decoder
    "gpt_neo": "one sequence at a time with transformers' own cache",  # the module masks what a mask of ours allows
    "bloom": "one sequence at a time",  # positions come from the mask (ALiBi)
    "deepseek_v3": "different shapes",  # PEFT takes dense layers for routed experts
    "qwen3_next": "one sequence at a time",  # some layers keep no keys and values
}


@pytest.mark.parametrize("family", list(KINDS))
def test_every_cell_of_the_row_is_right(family: str, tmp_path: Path) -> None:
    base = load_base_model(str(save_tiny_family(family, tmp_path / family)), device="cpu", dtype="float32")
    row = check_model(base)
    assert row.is_right
    assert not row.refused
    assert KINDS[family] in row.sampling
    assert peft_problem(base, LoraAdapter.create(base.model, rank=2, alpha=4.0)) == ""


def test_an_adapter_that_peft_drops_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # The pattern by which transformers renames its shared experts finds them under the new name too.
    base = load_base_model(str(save_tiny_family("laguna", tmp_path)), device="cpu", dtype="float32")
    row = check_model(base)
    assert (row.gradient, row.sampler, row.adapter[:21]) == ("ok", "ok", "PEFT's logprobs are o")
    adapter = LoraAdapter.create(base.model, rank=2, alpha=4.0)
    for _ in range(2):
        say_if_peft_differs(base, adapter)
    assert caplog.text.count("PEFT does not load this adapter") == 1


def test_a_model_that_no_way_samples_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base_model(str(save_tiny_family("bloom", tmp_path)), device="cpu", dtype="float32")
    monkeypatch.setattr(decoding_check, "_TOLERANCE", {base.dtype: -1.0})
    row = check_model(base)
    assert "cannot sample from base_model" in row.refused
    assert row.is_right
