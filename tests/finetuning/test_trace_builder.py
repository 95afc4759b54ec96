"""The trace builder, from the files to the trajectories of an epoch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from nat.data_models.config import Config
from nat.data_models.finetuning import FinetuneRunConfig
from nat.runtime.loader import PluginTypes, discover_and_register_plugins, load_config

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.finetuning.traces.builder import EvsysTraceBuilder
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.rollouts.trajectories import calls_of

SETTINGS = Path(__file__).parents[2] / "configs" / "tiny.yml"


def atif(reward: float, **metrics: Any) -> dict[str, Any]:
    """A conversation of one call, with a reward."""
    steps = [{"source": "user", "message": "Who?"}, {"source": "agent", "message": "network", "metrics": metrics}]
    return {"agent": {"name": "a", "version": "1"}, "steps": steps, "extra": {"reward": reward}}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    path = tmp_path / "traces.json"
    path.write_text(json.dumps([atif(1.0, completion_token_ids=[5, 6]), atif(0.0), {"steps": ["x"], "agent": {}}]))
    return path


@pytest.fixture
def config(files: Path, tmp_path: Path) -> Config:
    discover_and_register_plugins(PluginTypes.ALL)
    settings = yaml.safe_load(SETTINGS.read_text())
    settings["llms"]["policy"]["output_dir"] = settings["finetuning"]["output_dir"] = str(tmp_path)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"id": "1", "question": "Who?", "answer": "network"}]))
    settings["eval"]["general"]["dataset"]["file_path"] = str(rows)
    builder = {"algorithm": "sft", "min_reward": 0.0, "feedback": "extra.reward", "files": [str(files)]}
    settings["trajectory_builders"]["builder"] = {"_type": "evsys_trace_builder", **builder}
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(settings))
    return load_config(path)


@pytest.fixture
async def builder(config: Config) -> AsyncIterator[EvsysTraceBuilder]:
    made = EvsysTraceBuilder(config.trajectory_builders["builder"])
    finetuning = config.finetuning.model_copy(update={"run_configuration": FinetuneRunConfig(config_file=config)})
    policy = Policy.of(config.llms["policy"])
    policy.begin_training()
    await made.initialize(finetuning)
    yield made
    await policy.close()


async def test_the_files_are_read_once_and_every_record_is_accounted_for(
    builder: EvsysTraceBuilder, files: Path
) -> None:
    await asyncio.to_thread(files.unlink)
    for epoch in ("first", "second"):
        await builder.start_run(epoch)
        ((trajectory,),) = (await builder.finalize(epoch)).trajectories
        assert [call.output_ids for call in calls_of(trajectory)] == [[5, 6]]
        report = builder.report
        assert report is not None
        assert not report.staleness, "no version of the policy sampled them"
        assert +report.lost == {DropReason.TEXT_ONLY: 1, DropReason.UNREADABLE_RECORD: 1}
        assert f"{files}, record 3: no trajectory in a form" in report.errors[DropReason.UNREADABLE_RECORD]
