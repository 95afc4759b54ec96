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


def test_a_damaged_file_is_no_environment(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{")
    assert read_environments(tmp_path) == []
