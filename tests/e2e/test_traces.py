"""What `nat eval` writes of an agent's runs is what `nat finetune` learns from: nothing between them but files."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf.json_format import MessageToDict
from nat.data_models.intermediate_step import IntermediateStep
from nat_process import ROOT, Finished, first_rows, newest_run, run_nat
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from pydantic import TypeAdapter

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.rollouts.traces.files import read_records
from nat_plugin_evsys.rollouts.traces.to_calls import CallReader

KEYS = {name: name for name in ("question", "answer", "generated_answer", "intermediate_steps")}
ROWS, REPS = 8, 4
SYSTEM = "You are a help desk."


@dataclass(frozen=True)
class Recorded:
    """The files of a recording, and the configuration that made it."""

    directory: Path
    config: dict[str, Any]

    @property
    def traces(self) -> Path:
        return self.directory / "traces.jsonl"

    @property
    def output(self) -> Path:
        """Has every run."""
        return self.directory / "eval" / "workflow_output.json"

    def learn(
        self, tmp_path: Path, files: list[Path], builder: dict[str, Any], *, epochs: int = 1, **adapter: Any
    ) -> Finished:
        """Some epochs of `nat finetune` on files."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
        config["llms"]["policy"]["output_dir"] = config["finetuning"]["output_dir"] = str(tmp_path / "runs")
        config["eval"]["general"]["dataset"] = self.config["eval"]["general"]["dataset"]
        config["trajectory_builders"]["builder"] = {
            "_type": "evsys_trace_builder",
            "files": [str(path) for path in files],
            **builder,
        }
        config["trainer_adapters"]["adapter"] = {"_type": "evsys_trainer_adapter", "policy": "policy", **adapter}
        config["trainers"]["trainer"] |= {"validation_dataset": None}
        config["finetuning"]["num_epochs"] = epochs
        path = tmp_path / "learn.yml"
        path.write_text(yaml.safe_dump(config))
        return run_nat("finetune", "--config_file", str(path))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """Attempts of the base model at some tickets, in every form in which NAT writes them."""
    directory = tmp_path_factory.mktemp("recorded")
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
    config = {name: config[name] for name in ("llms", "workflow", "eval")}
    config["llms"]["policy"] |= {"checkpoint": "none", "eval_temperature": 1.0, "output_dir": str(directory / "runs")}
    exporter = {"_type": "file", "output_path": str(directory / "traces.jsonl"), "project": "desk"}
    config["general"] = {"telemetry": {"tracing": {"traces": exporter}}}
    general = config["eval"]["general"]
    del general["output_dir"]
    general["max_concurrency"] = 4  # NAT's exporter loses what is in flight when the process ends
    general["output"] = {
        "dir": str(directory / "eval"),
        "write_atif_workflow_output": True,
        "workflow_output_step_filter": ["LLM_START", "LLM_END"],
    }
    rows = first_rows(ROOT / general["dataset"]["file_path"], ROWS, directory / "rows.json")
    general["dataset"]["file_path"] = str(rows)
    path = directory / "record.yml"
    with collector(directory / "otlp.jsonl") as endpoint:
        spans = {"_type": "otelcollector", "endpoint": endpoint, "project": "desk", "batch_size": 1}
        config["general"]["telemetry"]["tracing"]["spans"] = spans
        path.write_text(yaml.safe_dump(config))
        done = run_nat("eval", "--config_file", str(path), "--reps", str(REPS))
    assert done.code == 0, done.text
    return Recorded(directory, config)


@contextmanager
def collector(target: Path) -> Iterator[str]:
    """An OpenTelemetry collector with its ``file`` exporter: writes each batch that it receives as a line of JSON."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["Content-Length"])))
            with target.open("a") as file:
                file.write(json.dumps(MessageToDict(request)) + "\n")
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    server.shutdown()
    thread.join()
    server.server_close()


class WordRenderer:
    """A token a word."""

    def render(self, messages: Any, tools: Any) -> list[int]:
        return [len(word) for message in messages for word in message["content"].split()]

    def render_reply(self, message: Any) -> list[int]:
        return [len(word) for word in message["content"].split()] + [0]


@pytest.mark.parametrize("name", ["traces.jsonl", "otlp.jsonl"])
def test_the_prompt_of_a_trace_is_what_the_model_read(recorded: Recorded, name: str) -> None:
    """The exporter mixes the lines of runs that went on at once; its last lines may be cut off with the process."""
    records = read_records([recorded.directory / name], KEYS, "files")
    assert len(records) > 1
    whole = [record for record in records if record.problem is None]
    assert whole
    for record in whole:
        (call,) = record.calls
        assert [message["role"] for message in call.messages] == ["system", "user"]
        assert call.messages[0]["content"] == SYSTEM
        assert call.messages[1]["content"] == record.question
        assert call.reply == {"role": "assistant", "content": record.output}
        assert TypeAdapter(list[IntermediateStep]).validate_python(record.steps), "evaluators are given them"
    assert {record.problem for record in records} <= {None, DropReason.UNFINISHED_TRACE, DropReason.PROMPT_UNKNOWN}


@pytest.mark.parametrize("name", ["traces.jsonl", "otlp.jsonl"])
def test_a_line_that_names_a_run_adds_to_its_record(recorded: Recorded, name: str, tmp_path: Path) -> None:
    traces, notes = recorded.directory / name, tmp_path / "notes.jsonl"
    run = read_records([traces], KEYS, "files")[0].entry["workflow_run_id"]
    notes.write_text(json.dumps({"workflow_run_id": run, "feedback": "up"}))
    noted = [record for record in read_records([traces, notes], KEYS, "files") if "feedback" in record.entry]
    assert [(record.entry["workflow_run_id"], record.entry["feedback"]) for record in noted] == [(run, "up")]


def test_a_record_without_the_prompt_is_not_trained_on(recorded: Recorded, tmp_path: Path) -> None:
    """By default `nat eval` leaves LLM_START out; its ATIF never has the system prompt."""
    bare = tmp_path / "workflow_output.json"
    rows = json.loads(recorded.output.read_text())
    for row in rows:
        row["intermediate_steps"] = [s for s in row["intermediate_steps"] if s["payload"]["event_type"] == "LLM_END"]
    bare.write_text(json.dumps(rows))
    reader = CallReader(WordRenderer(), True, 1.0, frozenset({"builtin/tiny"}))
    for path in (bare, recorded.directory / "eval" / "workflow_output_atif.json"):
        records = read_records([path], KEYS, "files")
        assert len(records) == ROWS * REPS
        assert {reader.calls(record, "run")[1] for record in records} == {DropReason.PROMPT_UNKNOWN}


def test_it_learns_the_best_records(recorded: Recorded, tmp_path: Path) -> None:
    """The evaluator scores them; every one is trained on or counted under its reason."""
    builder = {"algorithm": "sft", "min_reward": 1.0}
    done = recorded.learn(tmp_path, [recorded.output], builder, epochs=2, retokenize=True)
    assert done.code == 0, done.text
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    trajectories = summary["trajectories"]
    assert trajectories["trained"] > 0
    assert trajectories["trained"] + sum(trajectories["dropped"].values()) == 2 * ROWS * REPS
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())
    assert set(summary["dropped"]) <= {"not_selected", "validation"}
    metrics = [json.loads(line) for line in (newest_run(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    epoch, _ = [row for row in metrics if row["event"] == "epoch"]
    assert 2 * epoch["job"]["metrics"]["retokenized_calls"] == summary["trained"]
    assert 0.0 <= epoch["drift"] <= 0.5, "most of the toy's replies are single words"
    state = json.loads((newest_run(tmp_path) / "state.json").read_text())
    assert state["best_epoch"] is None, "the recorded rewards are no checkpoint's"


def test_pairs_by_feedback(recorded: Recorded, tmp_path: Path) -> None:
    """In each question the first reply is liked, and so are those like it; records without a feedback are counted."""
    traces = tmp_path / "workflow_output.json"
    rows = json.loads(recorded.output.read_text())
    first: dict[str, str] = {}
    for row in rows[:-1]:
        liked = first.setdefault(row["question"], row["generated_answer"])
        row["feedback"] = "up" if row["generated_answer"] == liked else "down"
    traces.write_text(json.dumps(rows))
    builder = {"algorithm": "dpo", "feedback": "feedback", "feedback_values": {"up": 1, "down": 0}}
    done = recorded.learn(tmp_path, [traces], builder, retokenize=True)
    assert done.code == 0, done.text
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    assert summary["trajectories"]["trained"] > 0
    assert summary["trajectories"]["dropped"]["no_feedback"] == 1
    assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())


def test_text_alone_is_refused_with_what_to_type(recorded: Recorded, tmp_path: Path) -> None:
    done = recorded.learn(tmp_path, [recorded.output], {"algorithm": "rl"})
    assert done.code == 1
    assert "records can be trained on. text_only" in done.text
    assert (
        "Set `retokenize: true` on the trainer adapter to train on the tokens of the text, which `algorithm: sft`"
        in (" ".join(done.text.split()))
    )
