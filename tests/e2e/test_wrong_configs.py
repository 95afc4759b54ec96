"""Acceptance: a wrong config ends soon, with one readable error line that says what to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nat_process import ROOT, run_nat

Config = dict[str, Any]


def unknown_field(config: Config, tmp_path: Path) -> None:
    config["trajectory_builders"]["builder"]["num_generatons"] = 5


def wrong_reward(config: Config, tmp_path: Path) -> None:
    config["finetuning"]["reward_function"]["name"] = "rewrad"


def no_reward(config: Config, tmp_path: Path) -> None:
    del config["finetuning"]["reward_function"]


def one_generation(config: Config, tmp_path: Path) -> None:
    config["trajectory_builders"]["builder"]["num_generations"] = 1


def missing_model(config: Config, tmp_path: Path) -> None:
    config["llms"]["policy"]["base_model"] = "./models/not-there"


def no_answer(config: Config, tmp_path: Path) -> None:
    dataset = config["eval"]["general"]["dataset"]
    rows = json.loads((ROOT / dataset["file_path"]).read_text())
    del rows[2]["answer"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset["file_path"] = str(tmp_path / "rows.json")


def other_llm(config: Config, tmp_path: Path) -> None:
    config["llms"]["other"] = {"_type": "openai", "model_name": "gpt", "api_key": "x"}
    config["workflow"]["llm_name"] = "other"


def other_output_dir(config: Config, tmp_path: Path) -> None:
    config["llms"]["policy"]["output_dir"] = str(tmp_path / "elsewhere")


def missing_demonstrations(config: Config, tmp_path: Path) -> None:
    config["trainers"]["trainer"]["warm_start"] = {"demonstrations": "nowhere.json"}


def cut_distribution(config: Config, tmp_path: Path) -> None:
    config["llms"]["policy"]["top_p"] = 0.8


def nothing_scored(config: Config, tmp_path: Path) -> None:
    config["trainers"]["trainer"] |= {"validation_dataset": None, "score_training_rows": False}


def batches_of_sequences_alone(config: Config, tmp_path: Path) -> None:
    config["llms"]["policy"] |= {"deterministic": True, "max_batch_size": 8}


def estimator_without_weight(config: Config, tmp_path: Path) -> None:
    config["trainer_adapters"]["adapter"]["kl_estimator"] = "k3"


def unknown_key_of_the_loss(config: Config, tmp_path: Path) -> None:
    config["trainer_adapters"]["adapter"] |= {"loss_fn": "ppo", "loss_fn_config": {"clip_low": 0.2}}


def failed_groups_after_the_curriculum(config: Config, tmp_path: Path) -> None:
    config["trainer_adapters"]["adapter"]["failed_groups"] = "batch_mean"
    config["finetuning"]["curriculum_learning"] = {"enabled": True}


def reward_of_its_own(config: Config, tmp_path: Path) -> None:
    config["trajectory_builders"]["builder"]["reward"] = {"name": "right_team"}


def targeted_functions(config: Config, tmp_path: Path) -> None:
    config["finetuning"]["target_functions"] = ["planner"]


def targeted_model(config: Config, tmp_path: Path) -> None:
    config["finetuning"]["target_model"] = "judge"


def overlapping_records(config: Config, tmp_path: Path) -> None:
    builder = {"_type": "evsys_trace_builder", "files": ["traces.jsonl"], "algorithm": "sft", "min_reward": 1.0}
    config["trajectory_builders"]["builder"] = builder
    config["trainers"]["trainer"]["overlap_rollouts"] = True


def filter_that_leaves_nothing(config: Config, tmp_path: Path) -> None:
    config["eval"]["general"]["dataset"]["filter"] = {"allowlist": {"field": {"id": ["nowhere"]}}}


def custom_dataset_without_rows(config: Config, tmp_path: Path) -> None:
    config["eval"]["general"]["dataset"] = {
        "_type": "custom",
        "file_path": "unread",
        "function": "nat.data_models.evaluator.EvalInput",
        "kwargs": {"eval_input_items": []},
    }


CASES = [
    (reward_of_its_own, ["reward `right_team` has no effect here", "set finetuning.reward_function"]),
    (targeted_functions, ["finetuning.target_functions has `planner`", "the workflow has ['<workflow>']"]),
    (targeted_model, ["finetuning.target_model is `judge`", "name the policy"]),
    (overlapping_records, ["trainers.trainer.overlap_rollouts does not go with evsys_trace_builder", "remove overlap"]),
    (filter_that_leaves_nothing, ["filter leaves none of its", "change its allowlist"]),
    (custom_dataset_without_rows, ["train: the dataset has no rows", "Run `nat eval`"]),
    (cut_distribution, ["llms.policy.top_p is 0.8", "set top_p: 1"]),
    (nothing_scored, ["trainers.trainer.score_training_rows is false", "set a validation_dataset, or"]),
    (batches_of_sequences_alone, ["max_batch_size has no effect with deterministic: true"]),
    (estimator_without_weight, ["kl_estimator has no effect without kl_beta"]),
    (unknown_key_of_the_loss, ["loss_fn_config of ppo has the unknown key 'clip_low'; it takes clip_low_threshold"]),
    (failed_groups_after_the_curriculum, ["failed_groups `batch_mean` has no effect with curriculum_learning"]),
    (unknown_field, ["no setting `num_generatons`", "did you mean `num_generations`?"]),
    (wrong_reward, ["`rewrad`", "eval.evaluators"]),
    (no_reward, ["finetuning.reward_function is not set"]),
    (one_generation, ["num_generations is 1", "set num_generations to 2 or more"]),
    (missing_model, ["./models/not-there", "no such directory"]),
    (no_answer, ["row 3 has no `answer`"]),
    (other_llm, ["uses ['other']", "set `workflow.llm_name: policy`"]),
    (other_output_dir, ["set both to the same directory"]),
    (missing_demonstrations, ["nowhere.json", "check the path"]),
]


@pytest.mark.parametrize(("change", "wanted"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_wrong_config(
    change: Callable[[Config, Path], None], wanted: list[str], tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    config = make_config("tiny", lambda settings: change(settings, tmp_path))
    done = run_nat("finetune", "--config_file", str(config), timeout=120)
    assert done.code != 0
    last = done.err.rstrip().splitlines()[-1]
    assert last.startswith("Error: "), done.text[-3000:]
    for text in wanted:
        assert text in last, last
    assert "Traceback" not in last
