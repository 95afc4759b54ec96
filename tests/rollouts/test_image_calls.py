"""Calls with images: chained by what they show, and made Datums whose images stand among the recorded ids."""

from __future__ import annotations

from typing import Any

import pytest

from nat_plugin_evsys.call_images import call_image, with_references
from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.engine.model.loading import load_tokenizer
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.rollouts.atif import atif_trajectory
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.rollouts.datums import chain_datum, group_datums, token_chains
from nat_plugin_evsys.rollouts.episodes import episode_of, message_chains
from nat_plugin_evsys.rollouts.traces.atif_records import record_of_atif
from nat_plugin_evsys.rollouts.traces.to_calls import CallReader
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup, build_trajectory, calls_of
from nat_plugin_evsys.training.group_material import datum_records

Make = Any
P = 9
RED, BLUE = call_image(1, 3, b"red", "png"), call_image(1, 3, b"blue", "png")
LATER = call_image(8, 2, b"later", "jpeg")
FIRST = [1, P, P, P, 2]
SECOND = [*FIRST, 3, 4, 5, P, P, 6]


def test_a_chain_has_the_same_images(call: Make) -> None:
    red, blue = call(FIRST, [3, 4], images=[RED]), call(FIRST, [3, 4], images=[BLUE])
    then = call(SECOND, [7], images=[BLUE, LATER])
    assert token_chains([red, blue, then]) == [[red], [blue, then]]
    assert token_chains([red, then]) == [[red], [then]]
    bare = call(SECOND, [7])
    assert token_chains([red, bare]) == [[red], [bare]]
    moved = call(FIRST, [3, 4], images=[call_image(2, 2, b"blue", "png")])
    assert token_chains([moved, then]) == [[moved], [then]]


def test_a_datum_has_the_images_at_their_places(call: Make) -> None:
    chain = [call(FIRST, [3, 4], images=[BLUE]), call(SECOND, [7], images=[BLUE, LATER])]
    datum, spans = chain_datum(chain, 0.5)
    chunks: list[Any] = datum.model_input.chunks
    assert [
        getattr(chunk, "tokens", None) or (chunk.data, chunk.format, chunk.expected_tokens) for chunk in chunks
    ] == [
        [1],
        (b"blue", "png", 3),
        [2, 3, 4, 5],
        (b"later", "jpeg", 2),
        [6],
    ]
    inputs = {name: tensor.tolist() for name, tensor in datum.loss_fn_inputs.items()}
    assert inputs["target_tokens"] == [*SECOND, 7][1:]
    assert inputs["advantages"] == [0, 0, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 0.5]
    assert [(span.start, span.stop) for span in spans] == [(4, 6), (10, 11)]
    assert datum.model_input.length == len(inputs["target_tokens"])


def shown(call: Make, image: Any) -> Any:
    message = {"role": "user", "content": [{"type": "text", "text": "see "}, {"type": "image_url", "image_url": {}}]}
    return call(FIRST, [3], images=[image], messages=with_references([message], [image]))


def test_conversations_differ_where_their_images_do(call: Make) -> None:
    red, blue = shown(call, RED), shown(call, BLUE)
    then = call(SECOND, [7], images=[BLUE], messages=[*blue.messages, blue.reply, {"role": "user", "content": "sure?"}])
    same_reply = {"reply": blue.reply}
    red = call(FIRST, [3], images=[RED], messages=red.messages, **same_reply)
    assert message_chains([red, blue, then]) == [[red], [blue, then]]
    assert episode_of([blue])[0].content == f"see <image {BLUE['sha256']}>"


def test_atif_names_the_files(call: Make) -> None:
    made = shown(call, BLUE)
    attempt = Attempt("row", "run", [made], 1.0, None, None)
    names: dict[str, Any] = {"session": "s", "name": "n", "agent": "a", "model": "m", "extra": {}}
    step = atif_trajectory(attempt, {}, lambda ids: [str(each) for each in ids], **names).steps[0]
    parts: Any = step.message
    assert parts[0].text == "see "
    assert (parts[1].source.path, parts[1].source.media_type) == (f"images/{BLUE['sha256']}.png", "image/png")


def test_a_trace_with_an_image_is_not_trained_on_as_text(call: Make) -> None:
    attempt = Attempt("row", "run", [shown(call, BLUE)], 1.0, None, None)
    names: dict[str, Any] = {"session": "s", "name": "n", "agent": "a", "model": "m", "extra": {}}
    kept = atif_trajectory(attempt, {}, lambda ids: [str(each) for each in ids], **names)
    record = record_of_atif(kept.model_dump(exclude_none=True), "it")
    renderer = ChatRenderer(load_tokenizer("builtin/tiny"))
    reader = CallReader(renderer, retokenize=True, temperature=1.0, model_names=frozenset())
    calls, reason, seen = reader.calls(record, "run")
    assert (calls, reason) == ([], DropReason.NOT_RENDERED)
    assert "`messages[0].content[1]` is a part of type `image`" in str(seen)


def test_a_trajectory_carries_them_and_checks_them(call: Make) -> None:
    made = shown(call, BLUE)
    trajectory = build_trajectory([made], 1.0, {})
    assert calls_of(trajectory) == [made]
    trajectory.metadata["calls"][0]["images"] = [{**BLUE, "sha256": RED["sha256"]}]  # type: ignore[index]
    with pytest.raises(DataError, match=r"call 0 \(.*\): images\[0\]: its file has SHA-256"):
        calls_of(trajectory)


def test_the_record_of_a_datum_has_ids_and_hashes(call: Make) -> None:
    group = TrajectoryGroup("g", [1.0, 0.0], [[call(SECOND, [7], images=[BLUE, LATER])], [call([1], [2])]])
    first, second = datum_records(group_datums(group, advantage="group_mean"), 0)
    assert first["model_input"] == SECOND
    assert first["images"] == [
        {"start": 1, "tokens": 3, "sha256": BLUE["sha256"]},
        {"start": 8, "tokens": 2, "sha256": LATER["sha256"]},
    ]
    assert "images" not in second
