"""What to type next: the command can be pasted into a shell as it is."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from nat_plugin_evsys.finetuning.advice import serve_command, why_nothing_was_trained
from nat_plugin_evsys.report.summary import RunSummary


def said(arguments: list[str], checkpoint: str = "latest") -> list[str]:
    """The words of the command that a shell sees, after a `finetune` with these arguments."""

    @click.command()
    @click.option("--config_file", type=click.Path(path_type=Path, resolve_path=True))
    @click.option("--override", "-o", multiple=True, type=(str, str))
    def finetune(**_: object) -> None:
        click.echo(serve_command({"policy": checkpoint}))

    result = CliRunner().invoke(finetune, arguments)
    assert result.exit_code == 0, result.output
    return shlex.split(result.output)


def test_a_path_with_spaces_is_one_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = said(["--config_file", "my agents/help desk's.yml"])
    assert words[1:] == ["run", "--config_file", "my agents/help desk's.yml", "--input", "…"]


def test_the_overrides_come_with_it(tmp_path: Path) -> None:
    config = str(tmp_path / "c.yml")
    given = ["-o", "workflow.system_prompt", 'Say "yes" & go', "-o", "llms.policy.max_tokens", "8"]
    given += ["-o", "trainers.trainer.resume", "true", "-o", "trainer_adapters.adapter.learning_rate", "1e-3"]
    words = said(["--config_file", config, *given])
    assert words[words.index(config) + 1 :] == [
        *("--override", "workflow.system_prompt", 'Say "yes" & go'),
        *("--override", "llms.policy.max_tokens", "8"),
        *("--input", "…"),
    ]


def test_a_checkpoint_that_was_trained_from_is_not_served_instead(tmp_path: Path) -> None:
    words = said(["--config_file", str(tmp_path / "c.yml")], checkpoint="runs/old/checkpoints/epoch-3")
    assert words[-5:] == ["--override", "llms.policy.checkpoint", "latest", "--input", "…"]


def test_outside_of_a_command() -> None:
    assert serve_command({"policy": "best"}) == 'nat run --config_file CONFIG.yml --input "…"'


class TestWhyNothingWasTrained:
    summary = RunSummary(0.0, 0.0, None, None, 9.0, 30, 0, {"validation": 6, "no_calls": 4, "zero": 20}, None, epochs=3)

    def test_the_first_finding_says_it(self) -> None:
        self.summary.findings = [{"sentence": "Every reward is 0.000."}]
        assert why_nothing_was_trained(self.summary) == (
            "nothing was trained in 3 epochs, so there is no adapter to serve. Every reward is 0.000."
        )

    def test_without_one_the_counts_do(self) -> None:
        self.summary.findings = []
        assert why_nothing_was_trained(self.summary).endswith("Every call was dropped (zero 20, no_calls 4).")
