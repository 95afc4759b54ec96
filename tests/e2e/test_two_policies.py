"""Acceptance: one `nat finetune` trains two policies, each by its own reward, as if each were trained alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nat_process import Finished, json_lines, newest_run, run_nat
from safetensors.torch import load_file

from nat_plugin_evsys.runs import RunDirectory, further_policies

ROWS = [{"id": str(number), "question": f"Is it {number}?", "answer": "yes"} for number in range(2)]
VOICES = {"alto": 1, "bass": 2}
"""The policies and their seeds."""


def choir(*voices: str, epochs: int, resume: bool = False) -> Callable[[dict[str, Any]], None]:
    """A choir of these voices; each is rewarded for the vowels that it sings itself."""

    def change(settings: dict[str, Any]) -> None:
        policy = settings["llms"].pop("policy") | {"deterministic": True}
        adapter = settings["trainer_adapters"].pop("adapter")
        settings["workflow"] = {"_type": "choir", "functions": [f"sing_{voice}" for voice in voices]}
        settings["functions"] = {f"sing_{voice}": {"_type": "speaker", "llm_name": voice} for voice in voices}
        settings["llms"] = {voice: {**policy, "seed": VOICES[voice]} for voice in voices}
        settings["eval"]["evaluators"] = {
            f"vowels_of_{voice}": {"_type": "voice_judge", "voice": at} for at, voice in enumerate(voices)
        }
        settings["trainer_adapters"] = {
            voice: {**adapter, "policy": voice, "reward": {"name": f"vowels_of_{voice}"}} for voice in voices
        }
        settings["trainers"]["trainer"] |= {"also_train": list(voices[1:]), "resume": resume}
        settings["finetuning"] |= {"trainer_adapter": voices[0], "num_epochs": epochs}
        del settings["finetuning"]["reward_function"]

    return change


@pytest.fixture
def sing(tmp_path: Path, make_config: Callable[..., Path], agents: dict[str, str]) -> Callable[..., Finished]:
    """``sing("alto", "bass", epochs=2)``: `nat finetune` of a choir."""

    def run(*voices: str, epochs: int, resume: bool = False) -> Finished:
        def change(settings: dict[str, Any]) -> None:
            (tmp_path / "rows.json").write_text(json.dumps(ROWS))
            settings["eval"]["general"]["dataset"]["file_path"] = str(tmp_path / "rows.json")
            settings["trainers"]["trainer"]["validation_dataset"] = str(tmp_path / "rows.json")
            settings["trajectory_builders"]["builder"]["num_generations"] = 4
            choir(*voices, epochs=epochs, resume=resume)(settings)

        return run_nat("finetune", "--config_file", str(make_config("tiny", change)), **agents)

    return run


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    record = run.state.last_checkpoint()
    assert record is not None
    return load_file(Path(run.locate(record.adapter)) / "adapter_model.safetensors")


def test_each_learns_what_it_learns_alone_also_if_the_run_is_resumed(
    sing: Callable[..., Finished], tmp_path: Path
) -> None:
    assert sing("bass", epochs=2).code == 0
    alone = weights(RunDirectory.open(newest_run(tmp_path)))
    for resume in (False, True):
        done = sing("alto", "bass", epochs=2 if resume else 1, resume=resume)
        assert done.code == 0, done.text[-4000:]

    alto = RunDirectory.open(newest_run(tmp_path))
    runs = {"alto": alto, **further_policies(alto)}
    assert runs.keys() == VOICES.keys()
    for name, tensor in weights(runs["bass"]).items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-5)
        assert "lora_A" in name or not torch.allclose(tensor, weights(alto)[name], rtol=0, atol=1e-4)

    for at, (voice, run) in enumerate(runs.items()):
        summary = json.loads(run.summary_path.read_text())
        assert summary["trained"] == 2 * len(ROWS) * 4
        assert summary["calls"] == summary["trained"] + sum(summary["dropped"].values())
        assert f"Policy {voice}\nFinished 2 epochs" in done.out

        epochs = [row for row in json_lines(run.metrics_path) if row["event"] == "epoch"]
        assert [(row["epoch"], row["policy"]) for row in epochs] == [(1, voice), (2, voice)]
        assert all("entropy:mean" in row["job"]["metrics"] for row in epochs)
        with gzip.open(run.path / "rollouts" / "epoch-0002.jsonl.gz", "rt") as lines:
            rollouts = [json.loads(line)["extra"] for line in lines]
        sung = [rollout["output"].split("|")[at] for rollout in rollouts]
        assert [rollout["reward"] for rollout in rollouts] == [vowels(words) for words in sung]


def vowels(text: str) -> int:
    return sum(letter in "aeiou" for letter in text)
