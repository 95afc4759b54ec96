"""A model split over two processes computes what one process computes, and each holds its part only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from split_program import computed

from nat_plugin_evsys.engine.model.loading import default_cache_dir
from nat_plugin_evsys.engine.model.source import find_local
from nat_plugin_evsys.engine.model.tensor_parallel import loading_options
from nat_plugin_evsys.errors import ModelError

PROGRAM = Path(__file__).parents[2] / "support" / "split_program.py"


def tiny() -> str:
    source = find_local("builtin/tiny", default_cache_dir())
    assert source is not None
    return str(source.directory)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("split")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), tiny(), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(output / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return computed(tiny(), 1)


@pytest.mark.parametrize("name", ["forward", "bare", "both"])
def test_logprobs_are_those_of_one_process(split: list[dict[str, Any]], alone: dict[str, Any], name: str) -> None:
    for rank in split:
        for found, expected in zip(rank["logprobs"][name], alone["logprobs"][name], strict=True):
            assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5), (found - expected).abs().max()


def test_each_process_has_the_whole_gradient(split: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert split[0]["gradient"].keys() == alone["gradient"].keys()
    for name, expected in alone["gradient"].items():
        for rank in split:
            gap = float((rank["gradient"][name] - expected).norm() / expected.norm())
            assert gap < 1e-5, f"{name}: {gap:.1e}"
        assert torch.equal(split[0]["gradient"][name], split[1]["gradient"][name])


def test_the_processes_cut_a_step_alike_where_one_has_less_memory(
    split: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    expected = alone["order"]
    assert expected["parts"] == 1.0
    for rank in split:
        assert rank["order"]["parts"] > 1.0
        for found, wanted in zip(rank["order"]["logprobs"], expected["logprobs"], strict=True):
            assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-5)
        for name, wanted in expected["gradient"].items():
            gap = float((rank["order"]["gradient"][name] - wanted).norm() / wanted.norm())
            assert gap < 1e-5, f"{name}: {gap:.1e}"


def test_each_process_holds_its_part_and_the_model_is_the_same(
    split: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rows, columns = alone["shapes"][name]
    for rank in split:
        assert rank["shapes"][name] == (rows // 2, columns)
        assert rank["identity"] == alone["identity"]
    assert split[0]["plain_tokens"] == 40.0, "the fast path reads weights by itself, and does not know parts"


def test_a_model_that_cannot_be_split_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be split into 3: num_attention_heads"):
        loading_options("builtin/tiny", tiny(), 3)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="transformers has no plan for gpt2"):
        loading_options("gpt2", tmp_path, 2)
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ModelError, match=r"cannot be split: transformers has a plan with .*moe"):
        loading_options("mixtral", tmp_path, 2)
