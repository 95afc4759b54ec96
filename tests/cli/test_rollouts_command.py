"""`nat evsys rollouts`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from nat.atif import Agent, Metrics, Observation, ObservationResult, Step, ToolCall, Trajectory
from nat_process import run_nat

from nat_plugin_evsys.cli.runs import evsys
from nat_plugin_evsys.runs import RunDirectory
from nat_plugin_evsys.runs.rollouts import Collection


def call(*arguments: object) -> Result:
    return CliRunner().invoke(evsys, ["rollouts", *map(str, arguments)])


def line(row: str, reply: str, **extra: Any) -> str:
    facts = {"collection": "epoch", "epoch": 1, "row_id": row, "attempt": 0, **extra}
    steps = [
        Step(step_id=1, source="user", message="Who?"),
        Step(step_id=2, source="agent", message=reply, metrics=Metrics(completion_tokens=7)),
    ]
    return Trajectory(agent=Agent(name="a", version="1"), steps=steps, extra=facts).model_dump_json(exclude_none=True)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory.create(tmp_path)
    lines = [line("r1", "so-so", reward=0.5), line("r2", "bad", reward=0.0), line("r3", "good", reward=1.0)]
    made.rollouts.write(Collection("epoch", 1), [*lines, line("r4", "lost", error="boom", dropped="evaluator_error")])
    made.rollouts.write(Collection("epoch", 2), [line("r1", "later\u2028on", reward=1.0)])
    return made


def order(output: str) -> list[str]:
    return sorted((word for word in ("so-so", "bad", "good", "lost") if word in output), key=output.index)


def test_the_newest_epoch_is_shown_unless_one_is_named(run: RunDirectory) -> None:
    assert "later" in call(run.path).output
    shown = call(run.path, "--epoch", 1).output
    assert order(shown) == ["so-so", "bad", "good", "lost"]
    assert "epoch-0001: 4 of 4 rollouts" in shown


def test_worst_and_best_first_and_a_limit(run: RunDirectory) -> None:
    assert order(call(run.path, "--epoch", 1, "--worst").output) == ["lost", "bad", "so-so", "good"]
    best = call(run.path, "--epoch", 1, "--best", "--limit", 2).output
    assert order(best) == ["good", "so-so"]
    assert "2 of 4 rollouts; --limit 4 shows all" in best


def test_one_row_or_the_rows_that_there_are(run: RunDirectory) -> None:
    assert order(call(run.path, "--epoch", 1, "--row", "r3").output) == ["good"]
    refused = call(run.path, "--epoch", 1, "--row", "r9")
    assert refused.exit_code != 0
    assert "r1, r2, r3, r4" in refused.output


def test_what_was_not_kept_is_said(run: RunDirectory) -> None:
    refused = call(run.path, "--kind", "heldout")
    assert refused.exit_code != 0
    assert "it has: epoch-0001, epoch-0002" in refused.output


def test_nothing_but_json_reaches_a_pipe(run: RunDirectory) -> None:
    done = run_nat("evsys", "rollouts", str(run.path), "--json")
    assert done.code == 0, done.text
    assert [json.loads(text)["extra"]["row_id"] for text in done.out.splitlines()] == ["r1"]


def test_json_is_atif(run: RunDirectory) -> None:
    lines = call(run.path, "--epoch", 1, "--json").output.splitlines()
    assert [Trajectory.model_validate_json(text).steps[1].message for text in lines] == ["so-so", "bad", "good", "lost"]
    assert json.loads(lines[3])["extra"]["dropped"] == "evaluator_error"


def test_tools_the_verdict_and_control_characters_are_shown(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    step = Step(
        step_id=1,
        source="agent",
        message="\x1b[2J[bold]markup[/bold]",
        metrics=Metrics(completion_tokens=3),
        tool_calls=[ToolCall(tool_call_id="1", function_name="lookup", arguments={"word": "wifi"})],
        observation=Observation(results=[ObservationResult(source_call_id="1", content="network")]),
        extra={"stop_reason": "length"},
    )
    facts = {"collection": "epoch", "epoch": 1, "row_id": "r", "attempt": 2, "reward": 0.0, "expected": "wanted"}
    facts |= {"reasoning": {"why": "wrong"}, "dropped": "zero_variance_group", "policy_versions": [4]}
    made = Trajectory(agent=Agent(name="a", version="1"), steps=[step], extra=facts)
    run.rollouts.write(Collection("epoch", 1), [made.model_dump_json()])
    shown = call(run.path).output
    assert "\x1b[2J" not in shown
    assert "␛[2J[bold]markup[/bold]" in shown
    assert '→ lookup({"word": "wifi"})' in shown
    assert "← network" in shown
    assert "cut at max_tokens" in shown
    assert "row r  attempt 3  policy 4  not trained on: zero_variance_group" in shown
    assert '{"why": "wrong"}' in shown
    assert "expected  wanted" in shown


def test_nothing_is_cut_in_a_narrow_terminal(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path)
    row = "simple_python_217_with_a_long_identifier_of_its_own"
    facts = {"reward": 0.5, "advantage": 0.25, "policy_versions": [3], "seconds": 12.5}
    run.rollouts.write(Collection("epoch", 1), [line(row, "yes", **facts)])
    shown = " ".join(call(run.path).output.replace("│", " ").split())
    assert f"row {row} attempt 1 policy 3 advantage +0.250 12.5 s" in shown
    assert "…" not in shown


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ('{"question": "Which team?", "functions": [{"name": "team"}]}', "question  Which team?"),
        ("Who?", None),  # the conversation has it
        ("Someone who says: Who?", "question  Someone who says: Who?"),
        (None, None),
    ],
)
def test_what_the_conversation_does_not_say_of_the_row_is_shown(
    tmp_path: Path, question: str | None, shown: str | None
) -> None:
    run = RunDirectory.create(tmp_path)
    run.rollouts.write(Collection("epoch", 1), [line("r1", "yes", question=question)])
    printed = call(run.path).output
    assert (shown or "") in printed
    assert ("question  " in printed) == (shown is not None)
    assert "functions" not in printed


def test_the_last_line_names_the_run(run: RunDirectory) -> None:
    assert call(run.path).output.splitlines()[-1] == f"{run.path.name}, epoch-0002: 1 of 1 rollouts"
