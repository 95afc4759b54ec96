"""Attempts become replies; what was said of one epoch is not said of the next."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.finetuning.collapse import collapse_of
from nat_plugin_evsys.finetuning.replies import reply_of
from nat_plugin_evsys.finetuning.watch import Watch
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import RolloutReport
from nat_plugin_evsys.report.findings import FindingId
from nat_plugin_evsys.report.metrics_log import EPOCH, RELOADED, MetricsLog
from nat_plugin_evsys.rollouts.attempts import Attempt


def call(content: str | None, sequence: int = 0, *, tokens: int = 3, stop: Any = "stop", **reply: Any) -> Call:
    return Call(
        call_id=f"chatcmpl-{sequence}",
        index=0,
        run_id="run",
        step_id=None,
        policy_version=0,
        prompt_ids=[1],
        output_ids=[2] * tokens,
        logprobs=[-1.0] * tokens,
        stop_reason=stop,
        temperature=1.0,
        top_p=1.0,
        messages=[],
        tools=[],
        reply={"role": "assistant", "content": content, **reply},
        sequence=sequence,
    )


def attempt(output: Any, *calls: Call, reward: float | None = 0.0, **changes: Any) -> Attempt:
    values = {"lost": None, "error": None, "question": "Wifi?", "expected": "network", **changes}
    return Attempt("row-1", "run", list(calls), reward, output=output, **values)


def report_of(*attempts: Attempt) -> RolloutReport:
    return RolloutReport(replies=[reply_of(attempt) for attempt in attempts])


def test_the_output_is_the_reply_and_all_calls_count() -> None:
    first, last = call("let me see", tokens=5, stop="length"), call("network", 1)
    reply = reply_of(attempt("network", first, last, reasoning={"output": "network", "mode": "exact"}))
    assert (reply.text, reply.tokens, reply.calls, reply.cut) == ("network", 8, 2, 1)
    assert (reply.question, reply.expected, reply.verdict) == ("Wifi?", "network", "mode: exact")


def test_a_failed_workflow_shows_the_policys_last_words_and_its_error() -> None:
    wanted = [{"function": {"name": "look_up", "arguments": '{"team": 1}'}}]
    reply = reply_of(attempt("", call("hm", 0), call("so", 1, tool_calls=wanted), error="ValueError: no team"))
    assert reply.text == 'so look_up({"team": 1})'
    assert reply.verdict == "ValueError: no team"


@pytest.mark.parametrize(
    ("expected", "wanted"), [(math.nan, None), (None, None), ("", None), ({"team": "é"}, '{"team": "é"}')]
)
def test_what_a_row_wants(expected: Any, wanted: str | None) -> None:
    assert reply_of(attempt("x", expected=expected)).expected == wanted


def test_a_long_verdict_is_shortened() -> None:
    reply = reply_of(attempt("x", reasoning="very\nlong " * 100))
    assert len(reply.verdict) == 200
    assert reply.verdict.startswith("very long very long")


def test_a_finding_is_said_once_over_restarts_and_kept_in_every_row(tmp_path: Path) -> None:
    report = report_of(attempt("network", call("network")), attempt("payroll", call("payroll")))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    said = []
    for epoch in (1, 2):
        columns, new = Watch(MetricsLog(log.path)).look(epoch, report, {}, None)
        said.append([finding.id for finding in new])
        log.append(EPOCH, epoch, trained=0, **columns)
    assert said == [[FindingId.SAME_REWARD], []]
    assert [[each["id"] for each in row["findings"]] for row in log.rows()] == [["same_reward"]] * 2
    assert log.rows()[0]["replies"]["calls"] == 2


def test_the_last_epoch_that_trained_is_read_from_the_log(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    both = report_of(attempt("network", call("network"), reward=1.0), attempt("x", call("x")))
    for epoch, trained in ((1, 2), (2, 2)):
        columns, _ = Watch(log).look(epoch, both, {"trained": trained}, None)
        log.append(EPOCH, epoch, trained=trained, **columns)
    equal = report_of(attempt("x", call("x")), attempt("x", call("x")))
    _, [finding] = Watch(log).look(3, equal, {}, None)
    assert "lost its signal after epoch 2" in finding.sentence


def test_entropies_are_read_from_the_log(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    both = report_of(attempt("network", call("network"), reward=1.0), attempt("x", call("x")))
    for epoch, entropy in ((1, 2.0), (2, 0.3), (3, 0.1)):
        job = {"trained": 2, "metrics": {"entropy:mean": entropy}}
        columns, new = Watch(log).look(epoch, both, job, None)
        log.append(EPOCH, epoch, job=job, trained=2, **columns)
        assert [finding.id for finding in new if finding.id == FindingId.LOW_ENTROPY] == [FindingId.LOW_ENTROPY] * (
            epoch == 3
        )


def test_a_collapse_is_reloaded_once_although_a_pass_takes_several_epochs(tmp_path: Path) -> None:
    log, reloads = MetricsLog(tmp_path / "metrics.jsonl"), []
    start, learned, ruined = [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]
    for epoch, rewards in enumerate([*[start] * 4, *[learned] * 4, ruined, ruined, *[learned] * 12], 1):
        report = report_of(*(attempt("x", call("x"), reward=reward) for reward in rewards))
        report.epochs_per_pass = 4
        columns, _ = Watch(log).look(epoch, report, {"trained": 2}, None)
        if collapse_of(columns) is not None:
            columns[RELOADED] = "epoch-0008"
            reloads.append(epoch)
        log.append(EPOCH, epoch, trained=2, **columns)
    assert reloads == [10]
