"""What is kept of the rollouts, and under which reason a rollout counts as not trained on."""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nat.atif import Trajectory
from rich.console import Console

from nat_plugin_evsys.call_images import call_image, image_path, with_references
from nat_plugin_evsys.calls import Call, CallFate
from nat_plugin_evsys.finetuning.rollout_keeper import RolloutKeeper, plain, rollout_facts, token_texts
from nat_plugin_evsys.report.blocks import make_block
from nat_plugin_evsys.report.transcripts import transcript
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.runs.rollouts import Collection, RolloutFiles

EPOCH = Collection("epoch", 1)


def make_call(call_id: str) -> Call:
    return Call(
        call_id=call_id,
        index=0,
        run_id="run",
        step_id=None,
        policy_version=3,
        prompt_ids=[1],
        output_ids=[65, 66],
        logprobs=[-0.5, -0.25],
        stop_reason="stop",
        temperature=1.0,
        top_p=1.0,
        messages=[{"role": "user", "content": "?"}],
        tools=[],
        reply={"role": "assistant", "content": "AB"},
        sequence=0,
    )


def attempt(row: str = "r1", number: int = 0, *, calls: int = 1, **fields: Any) -> Attempt:
    defaults: dict[str, Any] = {
        "row_id": row,
        "question": "?",
        "expected": "!",
        "entry": {"id": row},
        "number": number,
        "run_id": f"{row}/{number}",
        "calls": [make_call(f"{row}/{number}/{index}") for index in range(calls)],
        "output": "AB",
        "reward": 1.0,
        "reasoning": {"expected": "!"},
        "lost": None,
        "error": None,
        "seconds": 0.25,
    }
    return Attempt(**(defaults | fields))


def keeper(directory: Path, rows: int | None = None) -> RolloutKeeper:
    files = RolloutFiles(directory)
    return RolloutKeeper(files, lambda token: bytes([token]), rows=rows, session="run-1", agent="a", model="m")


def read(directory: Path, collection: Collection) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RolloutFiles(directory).lines(collection)]


async def test_rows_come_together_and_training_rows_are_bounded(tmp_path: Path) -> None:
    made = [attempt(row, number) for number in (0, 1) for row in ("r1", "r2", "r3")]
    for collection in (EPOCH, Collection("heldout", 1), Collection("train", 0)):
        await keeper(tmp_path, rows=2).keep(collection, made)

    def kept(collection: Collection) -> list[tuple[str, int]]:
        return [(line["extra"]["row_id"], line["extra"]["attempt"]) for line in read(tmp_path, collection)]

    assert kept(EPOCH) == kept(Collection("train", 0)) == [("r1", 0), ("r1", 1), ("r2", 0), ("r2", 1)]
    assert kept(Collection("heldout", 1)) == [(row, number) for row in ("r1", "r2", "r3") for number in (0, 1)]


async def test_a_bound_of_0_keeps_nothing_of_training(tmp_path: Path) -> None:
    await keeper(tmp_path, rows=0).keep(EPOCH, [attempt()])
    assert RolloutFiles(tmp_path).collections() == []


async def test_a_kept_rollout_says_what_became_of_it(tmp_path: Path) -> None:
    made = attempt()
    await keeper(tmp_path).keep(EPOCH, [made], fates={made.calls[0].key: CallFate(None, 0.5, [-0.4, -0.2])})
    line = read(tmp_path, EPOCH)[0]
    facts, metrics = line["extra"], line["steps"][-1]["metrics"]
    assert (facts["question"], facts["expected"], facts["reward"], facts["seconds"]) == ("?", "!", 1.0, 0.25)
    assert facts["reasoning"] == {"expected": "!"}
    assert (facts.get("dropped"), facts["advantage"], facts["policy_versions"]) == (None, 0.5, [3])
    assert metrics["extra"] == {"token_texts": ["A", "B"], "advantage": 0.5, "learner_logprobs": [-0.4, -0.2]}
    assert line["trajectory_id"] == "epoch-0001/r1/0"


@pytest.mark.parametrize(
    ("fields", "fates", "held_back", "reason"),
    [
        ({}, [CallFate(None, 0.5)], None, None),
        ({"calls": 2}, [CallFate("empty_output"), CallFate(None, 0.5)], None, None),
        ({"calls": 2}, [CallFate("empty_output"), CallFate("empty_prompt")], None, "empty_output"),
        ({}, [CallFate("zero_variance_group")], None, "zero_variance_group"),
        ({"reward": None, "lost": "rollout_timeout"}, [], None, "rollout_timeout"),
        ({"calls": 0}, [], None, "no_calls"),
        ({}, [], "curriculum_percentile", "curriculum_percentile"),
        ({}, [], None, "not_reached"),
    ],
)
def test_drop_reasons(fields: dict[str, Any], fates: list[CallFate], held_back: str | None, reason: str | None) -> None:
    made = attempt(**fields)
    known = {call.key: fate for call, fate in zip(made.calls, fates, strict=False)}
    assert rollout_facts(EPOCH, made, known, held_back).dropped == reason


def test_measuring_rollouts_are_not_trained_on() -> None:
    assert rollout_facts(Collection("heldout", 0), attempt(), {}, None).dropped == "validation"


async def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rollouts").write_text("in the way")
    await keeper(tmp_path).keep(EPOCH, [attempt()])
    assert "rollouts of epoch-0001 were not kept" in caplog.text


def test_a_character_of_several_tokens_belongs_to_the_one_that_completes_it() -> None:
    pieces = {0: b"a", 1: "é".encode()[:1], 2: "é".encode()[1:], 3: b"\xff"}
    texts = token_texts(lambda token: pieces[token])
    assert texts([0, 1, 2, 0]) == ["a", "", "é", "a"]
    assert texts([0, 1]) == ["a", "�"]
    assert texts([3, 0]) == ["�", "a"]
    assert texts([]) == []


def test_what_json_has_no_word_for_is_shown_as_its_text() -> None:
    assert plain({"when": date(2026, 1, 2), 1: (float("nan"), Path("x"))}) == {"when": "2026-01-02", "1": [None, "x"]}
    nested = np.array([{"when": date(2026, 1, 2), "where": np.array([1.5, float("nan")])}, None], dtype=object)
    assert plain({"lists": nested}) == {"lists": [{"when": "2026-01-02", "where": [1.5, None]}, None]}


async def test_images_are_kept_once_and_named(tmp_path: Path) -> None:
    one, other = call_image(0, 1, b"one", "png"), call_image(0, 1, b"other", "jpeg")
    message = {"role": "user", "content": [{"type": "text", "text": "see "}, {"type": "image_url", "image_url": {}}]}
    made = []
    for number, image in enumerate([one, one, other]):
        call = replace(make_call(str(number)), images=[image], messages=with_references([message], [image]))
        # The dataset has the picture too, as a URL in a field of its own.
        entry = {"id": "r", "picture": f"data:image/{image['format']};base64,{image['data']}"}
        made.append(replace(attempt("r", number), calls=[call], entry=entry))
    await keeper(tmp_path).keep(EPOCH, made)
    directory = tmp_path / "rollouts"
    files = {f"images/{path.name}": path.read_bytes() for path in (directory / "images").iterdir()}
    assert files == {image_path(one): b"one", image_path(other): b"other"}
    found = read(tmp_path, EPOCH)
    assert [line["extra"]["entry"]["picture"] for line in found] == [image_path(each) for each in (one, one, other)]
    assert [line["steps"][0]["message"][1]["source"]["path"] for line in found] == [
        image_path(each) for each in (one, one, other)
    ]
    assert not any("base64" in line for line in RolloutFiles(tmp_path).lines(EPOCH))
    read_back = Trajectory.model_validate(found[0])
    console = Console(width=200)
    with console.capture() as shown:
        console.print(transcript(read_back))
    assert f"see [image {image_path(one)}]" in shown.get()
    row = json.loads(gzip.decompress(base64.b64decode(make_block(EPOCH, RolloutFiles(tmp_path).lines(EPOCH)).data)))
    assert row["rows"][0]["attempts"][0]["steps"][0]["text"] == f"see [image {image_path(one)}]"
