"""The page as a file: what is in it, and what can never be."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import random
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_run import MadeRun

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.cli.runs import evsys
from nat_plugin_evsys.report.blocks import make_block
from nat_plugin_evsys.report.cost import cost
from nat_plugin_evsys.report.drop_reasons import drop_reason_meanings
from nat_plugin_evsys.report.metrics_log import EPOCH
from nat_plugin_evsys.report.page import Report
from nat_plugin_evsys.report.replies import ReplyNumbers
from nat_plugin_evsys.runs.state import RunState

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture
def made(tmp_path: Path) -> MadeRun:
    made = MadeRun(tmp_path)
    made.measure(0, [made.attempt("h1", HOSTILE, 0.0)])
    made.train(1, [[made.attempt("r1", HOSTILE, float(number), number, question=HOSTILE) for number in (0, 1)]])
    made.measure(1, [made.attempt("h1", "yes", 1.0)])
    return made


def embedded(html: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The data of the page, and its blocks by their element's id."""
    data = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    blocks = re.findall(r'<script type="text/plain" id="([^"]+)">([^<]*)</script>', html)
    return json.loads(data[1]), {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in blocks}


def test_the_blocks_hold_what_was_said_and_sampled(made: MadeRun) -> None:
    data, blocks = embedded(Report([made.path]).html())
    assert list(blocks) == ["block-0-heldout-0000", "block-0-epoch-0001", "block-0-heldout-0001"]
    assert [entry["element"] for entry in data["runs"][0]["collections"]] == list(blocks)
    (row,) = blocks["block-0-epoch-0001"]["rows"]
    assert (row["id"], row["question"]) == ("r1", HOSTILE)
    first, second = row["attempts"]
    assert (first["reward"], first["advantage"], second["advantage"]) == (0.0, -0.5, 0.5)
    user, reply = second["steps"]
    assert (user["role"], user["text"]) == ("user", HOSTILE)
    assert "".join(reply["tokens"]["t"]) == HOSTILE + "<|im_end|>"
    assert (reply["tokens"]["p"][0], reply["tokens"]["l"][0]) == (-500, -400)


def test_nothing_that_was_said_can_become_code(made: MadeRun) -> None:
    html = Report([made.path]).html()
    assert "alert(1)</script>" not in html
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = policy[1].replace("&#39;", "'").replace("&#43;", "+")
    assert allowed.startswith("default-src 'none'; script-src " + " ".join(f"'sha256-{each}'" for each in digests))
    assert len(html.split("<script")) - 1 == len(scripts) + 1 + 3  # and the data, and three blocks


def test_writing_again_reads_only_what_is_new(made: MadeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report([made.path])
    report.html()
    read: list[str] = []
    original = type(made.run_dir.rollouts).lines
    monkeypatch.setattr(
        type(made.run_dir.rollouts),
        "lines",
        lambda self, collection: (read.append(str(collection)), original(self, collection))[1],
    )
    made.train(2, [[made.attempt("r1", "x", float(number), number) for number in (0, 1)]])
    assert "block-0-epoch-0002" in report.html()
    assert read == ["epoch-0002"]


def test_only_what_can_be_embedded_is_made_and_only_what_is_embedded_is_held(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    made_by = "nat_plugin_evsys.report.blocks.make_block"
    monkeypatch.setattr(made_by, lambda *args: (read.append(str(args[0])), make_block(*args))[1])
    room = 12_000
    report = Report([made.path], megabytes=room / 1_000_000)
    chance = random.Random(0)
    for epoch in range(2, 41):
        words = [" ".join(f"word{chance.randrange(500)}" for _ in range(40)) for _ in range(4)]
        made.train(epoch, [[made.attempt("r1", text, float(number), number) for number, text in enumerate(words)]])
        made.measure(epoch, [made.attempt("h1", "yes", 1.0)])
        report.html()
        assert sum(len(block.data) for block in report._blocks[0]._made.values()) <= room
    assert len(read) < 81 + 39  # each once, in 39 reports, and now and then an older one that fits again
    read.clear()
    data, embedded_blocks = embedded(Report([made.path], megabytes=room / 1_000_000).html())  # as a resumed run does
    assert list(embedded_blocks) == list(embedded(report.html())[1])
    assert len(read) <= len(embedded_blocks) + 4
    assert len(data["runs"][0]["collections"]) == 40 + 41
    heldout = data["runs"][0]["curve"]["heldout"]
    assert [point["count"] for point in heldout] == [1] * 41  # the rewards of rows whose rollouts are left out


def test_what_shows_the_change_is_embedded_first(made: MadeRun) -> None:
    for epoch in range(2, 6):
        made.train(epoch, [[made.attempt("r1", f"reply {number}", float(number), number) for number in range(8)]])
    data, blocks = embedded(Report([made.path], megabytes=0.0015).html())
    assert {"block-0-heldout-0000", "block-0-heldout-0001"} <= set(blocks)
    left_out = [entry for entry in data["runs"][0]["collections"] if entry["element"] is None]
    assert left_out
    assert all(entry["kind"] == "epoch" for entry in left_out)
    assert embedded(Report([made.path], megabytes=0).html())[1] == {}


def test_the_verdict_is_on_what_was_reloaded_where_the_last_epoch_was_given_up(made: MadeRun, tmp_path: Path) -> None:
    one_answer = [[made.attempt(row, "no", 0.0, n, expected=row) for n in range(4)] for row in ("a", "b", "c", "d")]
    made.measure(2, [made.attempt("h1", "no", 0.0)])
    made.train(2, one_answer, reloaded="epoch-0001")
    data, _ = embedded(Report([made.path]).html())
    [run] = data["runs"]
    assert [finding["id"] for finding in run["findings"] if 2 in finding["epochs"]]
    assert run["verdict"]["after"]["mean"] == 1.0
    assert run["verdict"]["rows"] == {"better": 1, "worse": 0, "same": 0}
    assert [point["mean"] for point in run["curve"]["heldout"]] == [0.0, 1.0, 0.0]

    other = MadeRun(tmp_path)
    other.measure(0, [other.attempt(row, "x", 0.0) for row in ("h1", "h2")])
    other.measure(1, [other.attempt(row, "x", 0.25) for row in ("h1", "h2")])
    data, _ = embedded(Report([made.path, other.path]).html())
    assert data["comparison"].startswith("A is better: on the same 1 held-out rows it earned 0.750 more")


def test_the_tokens_sampled_are_those_of_all_rollouts_that_training_took_from() -> None:
    numbers = ReplyNumbers.of([]).to_dict() | {"replies": 4, "tokens_mean": 2.5}
    job = {"metrics": {"sampled_tokens": 12}}
    row = {"event": EPOCH, "rollouts": 4, "extra_rollouts": 4, "replies": numbers, "job": job}
    found = cost([{**row, "sampled_tokens": 30}], RunState())
    assert (found["rollouts"], found["sampled_tokens"], found["trained_tokens"]) == (8, 30, 12)
    assert cost([row, {**row, "sampled_tokens": 30}], RunState())["sampled_tokens"] == 10 + 30  # resumed, now counted
    assert cost([{"event": EPOCH}], RunState())["sampled_tokens"] is None


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    data, blocks = embedded(Report([MadeRun(tmp_path).path]).html())
    assert blocks == {}
    assert data["runs"][0]["verdict"]["answer"] == "unmeasured"


def test_the_command_writes_it_where_it_says(made: MadeRun, tmp_path: Path) -> None:
    result = CliRunner().invoke(evsys, ["report", "--output_dir", str(tmp_path)])
    assert result.output.strip() == str(made.run_dir.report_path)
    assert made.run_dir.report_path.stat().st_size > 100_000
    both = CliRunner().invoke(evsys, ["report", str(made.path), str(made.path), "--output", str(tmp_path / "two.html")])
    assert both.output.strip() == str(tmp_path / "two.html")
    three = CliRunner().invoke(evsys, ["report", "a", "b", "c"])
    assert three.exit_code == 2
    assert "name one, or two to compare them" in three.output


def test_every_drop_reason_is_explained() -> None:
    meanings = drop_reason_meanings()
    assert list(meanings) == list(DropReason)
    assert meanings[DropReason.ROLLOUT_TIMEOUT] == "The rollout took longer than `rollout_timeout` and was cut off."


def test_the_libraries_are_those_of_the_index() -> None:
    vendor = files("nat_plugin_evsys.report.page_files").joinpath("vendor")
    table = dict(re.findall(r"\| `([^`]+)` \|.*\| `([0-9a-f]{64})` \|", vendor.joinpath("README.md").read_text()))
    found = {name: hashlib.sha256(vendor.joinpath(name).read_bytes()).hexdigest() for name in table}
    assert found == table
    assert {item.name for item in vendor.iterdir() if item.name.endswith((".js", ".css"))} == set(table)
