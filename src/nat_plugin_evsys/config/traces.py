"""The YAML type of the builder that learns from recorded trajectories."""

from pathlib import Path
from typing import Literal

from nat.data_models.finetuning import TrajectoryBuilderConfig
from pydantic import Field, model_validator

from nat_plugin_evsys.config.strict import RunRewardedConfig


class EvsysTraceBuilderConfig(RunRewardedConfig, TrajectoryBuilderConfig, name="evsys_trace_builder"):
    """Reads trajectories that NAT's exporters wrote, in place of rollouts. Rewards come from the evaluator that
    `finetuning.reward_function` names, or from a feedback in the records."""

    files: list[Path] = Field(
        min_length=1,
        description="What NAT wrote: the lines of its `file` telemetry exporter, or of an OpenTelemetry collector's; "
        "`workflow_output.json` or `workflow_output_atif.json` of `nat eval`; trajectories in ATIF (also those of "
        "`rollouts/`).",
    )
    algorithm: Literal["sft", "dpo", "rl"] = Field(
        description="`sft`: learn every reply of the best records. `dpo`: learn from pairs of records of the same "
        "question with different rewards. `rl`: importance-weighted policy gradients, where logprobs are recorded."
    )
    min_reward: float | None = Field(
        default=None, allow_inf_nan=False, description="`sft`: the best are the records of at least this reward."
    )
    top_share: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="`sft`: the best are this share of the records, those of the highest rewards.",
    )
    feedback: str | None = Field(
        default=None,
        description="Where a record has its reward, as keys joined by dots (`feedback`, `extra.reward`). A line "
        "`{workflow_run_id: …, feedback: …}` in any of the files adds to the record of that run. Default: the "
        "evaluator scores the record.",
    )
    feedback_values: dict[str, float] = Field(
        default_factory=dict, description="Rewards of feedbacks that are words, e.g. `{up: 1, down: 0}`."
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="`rl`: the temperature that the recorded calls were sampled at. Records do not say `top_p` or "
        "`top_k`: they must have been off, or the recorded logprobs are not those of what was sampled from.",
    )
    max_concurrency: int | None = Field(
        default=None, ge=1, description="Held-out rows in flight at once; default `eval.general.max_concurrency`."
    )
    rollout_timeout: float | None = Field(default=None, gt=0, description="Time limit of one held-out row in seconds.")
    evaluator_timeout: float = Field(
        default=600.0, gt=0, description="Time limit in seconds for the evaluator to score one record or held-out row."
    )

    @model_validator(mode="after")
    def _settings_fit_the_algorithm(self) -> "EvsysTraceBuilderConfig":
        chosen = self.min_reward is not None or self.top_share is not None
        if self.algorithm == "sft" and not chosen:
            raise ValueError("algorithm `sft` learns the best records; say which with min_reward or top_share")
        if self.algorithm != "sft" and chosen:
            raise ValueError(f"min_reward and top_share have no effect with algorithm `{self.algorithm}`; remove them")
        if self.feedback_values and self.feedback is None:
            raise ValueError("feedback_values has no effect without feedback; name the field that has the words")
        if self.algorithm != "rl" and "temperature" in self.model_fields_set:
            raise ValueError(f"temperature has no effect with algorithm `{self.algorithm}`; remove it")
        return self
