"""Which rows an epoch of the trajectory builder rolls out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nat.data_models.dataset_handler import EvalDatasetBaseConfig, EvalDatasetJsonConfig
from nat.data_models.finetuning import FinetuneConfig

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.config import EvsysPolicyConfig, EvsysTrainerAdapterConfig, EvsysTrajectoryBuilderConfig
from nat_plugin_evsys.finetuning.checks.trained_policies import TrainedPolicy
from nat_plugin_evsys.finetuning.telemetry import RunExporters
from nat_plugin_evsys.finetuning.trajectory_builder import EvsysTrajectoryBuilder
from nat_plugin_evsys.finetuning.workflow.dataset_rows import ChosenRows
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import PolicyRollouts
from nat_plugin_evsys.finetuning.workflow.sessions import Rollouts
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.rollouts.attempts import Attempt


class RolledOut(EvsysTrajectoryBuilder):
    """A trajectory builder whose every rollout of the workflow has a reward of 1, after one call or two."""

    def __init__(self, config: EvsysTrajectoryBuilderConfig, dataset: EvalDatasetBaseConfig) -> None:
        super().__init__(config)
        self.dataset = dataset
        self.rounds: list[ChosenRows | None] = []

    @property
    def _dataset(self) -> EvalDatasetBaseConfig:
        return self.dataset

    async def _roll_out(self, rollouts: Rollouts, reps: int, rows: ChosenRows | None = None) -> list[list[Attempt]]:
        self.rounds.append(rows)
        return [
            [
                Attempt("row", f"run-{number}", [_call("planner"), _call("solver")][: 1 + number], 1.0, None, None)
                for number in range(reps)
            ]
        ]


def _call(function: str) -> Call:
    return Call("id", 0, None, None, 0, [1], [2], [-1.0], "stop", 1.0, 1.0, [], [], {}, 0, functions=[function])


def _ids(rows: ChosenRows | None) -> list[str]:
    assert rows is not None
    parser, options = rows.parser()
    return list(parser(rows.file_path, **options)["id"])


@pytest.mark.parametrize(
    ("discount", "targets", "again"),
    [(1.0, ["<workflow>"], True), (0.9, ["<workflow>"], False), (0.9, ["planner"], True)],
)
async def test_a_row_is_rolled_out_again_if_no_call_that_is_trained_on_has_an_advantage(
    discount: float, targets: list[str], again: bool, tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"id": each, "question": "q"} for each in ("row", "other")]))
    dataset = EvalDatasetJsonConfig(file_path=str(tmp_path / "rows.json"))
    builder = RolledOut(EvsysTrajectoryBuilderConfig(num_generations=2, dynamic_sampling=1), dataset)
    builder.run_config = FinetuneConfig(target_functions=targets)
    adapter = EvsysTrainerAdapterConfig(policy="policy", discount=discount)
    policy = EvsysPolicyConfig(base_model="builtin/tiny")
    builder.by_policy = [PolicyRollouts(TrainedPolicy("policy", policy, "adapter", adapter, "reward"))]
    rollouts = Rollouts("epoch-0000", "rollout", 0, Recorder(), RunExporters({}))
    ((*attempts,),) = await builder._roll_out_groups(rollouts, 0)
    assert builder.rounds[0] is None
    assert [_ids(rows) for rows in builder.rounds[1:]] == [["row"]] * again
    assert sum(attempt.replaced for attempt in attempts) == 2 * again
