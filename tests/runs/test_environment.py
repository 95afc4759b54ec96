"""``environment.json``: with what a run was made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nat_plugin_evsys.runs.environment import add_environment, read_environments


def test_each_process_adds_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_environments(tmp_path) == []
    monkeypatch.setattr(sys, "argv", ["/usr/bin/nat", "finetune", "--config_file", "a file.yml"])
    add_environment(tmp_path)
    monkeypatch.setattr(sys, "argv", ["nat", "finetune", "-o", "llms.policy.api_key", "hunter2", "-o", "x.seed", "3"])
    add_environment(tmp_path)
    first, second = read_environments(tmp_path)
    assert first["command"] == "nat finetune --config_file 'a file.yml'"
    assert second["command"] == "nat finetune -o llms.policy.api_key '<redacted>' -o x.seed 3"
    assert first["packages"]["nat_plugin_evsys"]
    assert first["python"].count(".") == 2


@pytest.mark.parametrize(
    "word",
    [
        "--api-key=hunter2=",
        "--llms.policy.api_key=hunter2",
        "--note=tml-hunter2hunter2",
        "TOKEN=hunter2",
        "-o=a.key=hunter2",
    ],
)
def test_secrets_after_an_equals_sign_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr(sys, "argv", ["nat", "finetune", word, "--seed=3", "-o", "x.secret", "hunter2=="])
    add_environment(tmp_path)
    (read,) = read_environments(tmp_path)
    assert "hunter2" not in read["command"]
    assert read["command"].startswith(
        f"nat finetune '{word.partition('hunter2')[0].removesuffix('tml-')}<redacted>' --seed=3 "
    )


def test_a_damaged_file_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{")
    assert read_environments(tmp_path) == []
