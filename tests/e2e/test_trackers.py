"""Acceptance: `trackers:` in the YAML; each is read back by its own means, and one that is not there stops nothing."""

from __future__ import annotations

import importlib.util
import json
import shlex
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from nat_process import ROOT, Finished, first_rows, json_lines, newest_run, run_nat
from wandb_file import config, exit_code, history

INSTALLED = [name for name in ("tensorboard", "wandb", "mlflow") if importlib.util.find_spec(name) is not None]


def tracked(settings: dict[str, Any], tmp_path: Path, trackers: list[str]) -> None:
    """``tiny.yml`` on four rows with two optimizer steps an epoch, a reward for everything, and ``trackers``."""
    dataset = settings["eval"]["general"]["dataset"]
    train = ROOT / dataset["file_path"]
    dataset["file_path"] = str(first_rows(train, 4, tmp_path / "train.json"))
    held_out = first_rows(train.parent / "heldout.json", 2, tmp_path / "heldout.json")
    settings["trainers"]["trainer"] |= {
        "validation_dataset": str(held_out),
        "validation_interval": 1,
        "trackers": trackers,
    }
    settings["trajectory_builders"]["builder"]["num_generations"] = 2
    settings["trainer_adapters"]["adapter"] |= {"advantage": "reward", "groups_per_step": 2}
    settings["eval"]["evaluators"]["right_team"] |= {"mode": "regex"}
    for path in (tmp_path / "train.json", tmp_path / "heldout.json"):
        path.write_text(json.dumps([row | {"answer": ".*"} for row in json.loads(path.read_text())]))
    settings["finetuning"]["num_epochs"] = 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run with every tracker that is installed, and where it lies."""
    if not INSTALLED:
        pytest.skip("no tracker is installed")
    directory = tmp_path_factory.mktemp("tracked")
    settings = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
    settings["finetuning"]["output_dir"] = settings["llms"]["policy"]["output_dir"] = str(directory / "runs")
    tracked(settings, directory, INSTALLED)
    (directory / "config.yml").write_text(yaml.safe_dump(settings))
    done = run_nat("finetune", "--config_file", str(directory / "config.yml"), WANDB_MODE="offline")
    assert done.code == 0, done.text[-4000:]
    return directory, done


def needs(name: str) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{name} is not installed")


def expected(directory: Path) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Mean rewards of the epochs and losses of the steps, as the run's own files say."""
    rows = [row for row in json_lines(newest_run(directory) / "metrics.jsonl") if row["event"] == "epoch"]
    rewards = [(row["epoch"], row["reward_mean"]) for row in rows]
    return rewards, [(row["epoch"], row["job"]["metrics"]["loss:sum"]) for row in rows]


def losses_of_epochs(steps: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Steps 1 to 4 summed up to the two epochs that took two each."""
    assert [number for number, _ in steps] == [1, 2, 3, 4]
    values = [value for _, value in steps]
    return [(1, sum(values[:2])), (2, sum(values[2:]))]


def near(pairs: list[tuple[int, float]]) -> list[Any]:
    return [(at, pytest.approx(value, rel=1e-4, abs=1e-6)) for at, value in pairs]


def test_the_summary_says_where_each_is_and_what_it_got(finished: tuple[Path, Finished]) -> None:
    directory, done = finished
    summary = json.loads((newest_run(directory) / "summary.json").read_text())
    # two epochs, four steps, three validations of a reward and a table each
    assert {name: (count["sent"], count["lost"]) for name, count in summary["trackers"].items()} == {
        name: (12, 0) for name in INSTALLED
    }
    for name in INSTALLED:
        assert f"  {name:<16} {summary['trackers'][name]['where']} (12 records)" in done.out


def test_tensorboard(finished: tuple[Path, Finished]) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = newest_run(finished[0])
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rewards, losses = expected(finished[0])
    assert [(event.step, event.value) for event in events.Scalars("epoch/reward_mean")] == near(rewards)
    steps = [(event.step, event.value) for event in events.Scalars("step/loss_sum")]
    assert losses_of_epochs(steps) == near(losses)
    assert [event.step for event in events.Scalars("heldout/reward")] == [0, 1, 2]
    samples = events.Tensors("heldout/samples/text_summary")
    assert [event.step for event in samples] == [0, 1, 2]
    assert "heldout-01" in samples[0].tensor_proto.string_val[0].decode()
    assert "num_epochs: 2" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_wandb_offline(finished: tuple[Path, Finished]) -> None:
    needs("wandb")
    directory, done = finished
    summary = json.loads((newest_run(directory) / "summary.json").read_text())
    place = Path(shlex.split(summary["trackers"]["wandb"]["where"])[-1])
    [file] = place.glob("*.wandb")
    rows = history(file)
    rewards, losses = expected(directory)
    assert [(row["epoch"], row["epoch/reward_mean"]) for row in rows if "epoch/reward_mean" in row] == near(rewards)
    steps = [(row["optimizer_step"], row["step/loss_sum"]) for row in rows if "step/loss_sum" in row]
    assert losses_of_epochs(steps) == near(losses)
    tables = [row for row in rows if "heldout/samples/path" in row]
    assert [row["epoch"] for row in tables] == [0, 1, 2]
    shown = json.loads((place / "files" / tables[-1]["heldout/samples/path"]).read_text())
    assert [row[0] for row in shown["data"]] == ["heldout-01", "heldout-02"]
    assert config(file)["finetuning"]["num_epochs"] == 2
    assert exit_code(file) == 0
    assert "wandb:" not in done.err


def test_mlflow_file_store(finished: tuple[Path, Finished], monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    import mlflow

    directory, _ = finished
    client = mlflow.MlflowClient(tracking_uri=(directory / "runs" / "mlruns").as_uri())
    [found] = client.search_runs([client.get_experiment_by_name("runs").experiment_id])
    assert (found.info.run_name, found.info.status) == (newest_run(directory).name, "FINISHED")

    def values(name: str) -> list[tuple[int, float]]:
        return [(metric.step, metric.value) for metric in client.get_metric_history(found.info.run_id, name)]

    rewards, losses = expected(directory)
    assert values("epoch/reward_mean") == near(rewards)
    assert losses_of_epochs(values("step/loss_sum")) == near(losses)
    assert [epoch for epoch, _ in values("heldout/reward")] == [0, 1, 2]
    assert found.data.params["finetuning.num_epochs"] == "2"
    shown = mlflow.artifacts.load_dict(f"{found.info.artifact_uri}/heldout/samples-epoch-0002.json")
    assert [row[0] for row in shown["data"]] == ["heldout-01", "heldout-02"]


def test_a_server_that_is_not_there_stops_no_run(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    needs("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    config_file = make_config("tiny", lambda settings: tracked(settings, tmp_path, ["mlflow"]))
    done = run_nat(
        "finetune",
        "--config_file",
        str(config_file),
        MLFLOW_TRACKING_URI=uri,
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    assert done.code == 0, done.text[-4000:]
    assert done.err.count("! tracker mlflow: ") == 1
    summary = json.loads((newest_run(tmp_path) / "summary.json").read_text())
    count = summary["trackers"]["mlflow"]
    assert (count["where"], count["sent"], count["lost"]) == (None, 0, 12)
    assert uri.removeprefix("http://127.0.0.1:") in count["error"]
    assert "  mlflow           not reached (0 records, 12 lost: " in done.out


def test_a_tracker_that_is_not_installed_is_refused_at_once(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    absent = [name for name in ("tensorboard", "wandb", "mlflow") if name not in INSTALLED]
    if not absent:
        pytest.skip("all trackers are installed")
    config_file = make_config("tiny", lambda settings: tracked(settings, tmp_path, absent))
    done = run_nat("finetune", "--config_file", str(config_file))
    assert done.code != 0
    assert f"pip install 'nat_plugin_evsys[{absent[0]}]'" in done.err.rstrip().splitlines()[-1]
