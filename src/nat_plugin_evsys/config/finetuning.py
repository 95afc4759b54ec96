"""The trajectory builder's, trainer adapter's and trainer's YAML types."""

from pathlib import Path
from typing import Any, Literal

from nat.data_models.component_ref import LLMRef, TrainerAdapterRef
from nat.data_models.finetuning import (
    RewardFunctionConfig,
    TrainerAdapterConfig,
    TrainerConfig,
    TrajectoryBuilderConfig,
)
from pydantic import Field, model_validator

from nat_plugin_evsys.config.strict import RunRewardedConfig, StrictConfig
from nat_plugin_evsys.loss_config import resolve_loss_fn_config
from nat_plugin_evsys.runtime import defaults

_BY_WIDTH = (
    "If not set: less for a model that is wider (`hidden_size`) than 2,000, as in tinker-cookbook (see training.md)."
)


class EvsysTrajectoryBuilderConfig(RunRewardedConfig, TrajectoryBuilderConfig, name="evsys_trajectory_builder"):
    """Runs the workflow on the dataset and turns the recorded calls into trajectories, one group per row."""

    num_generations: int = Field(default=8, ge=1, description="Attempts at each dataset row (the group size).")
    rows_per_epoch: int | None = Field(
        default=None,
        ge=1,
        description="Dataset rows that one epoch rolls out before it trains; default: all. With N of M rows, M / N "
        "epochs visit every row once, in a new order each time, and each trains on rollouts of the newest policy. "
        "`finetuning.num_epochs` and `validation_interval` count these epochs.",
    )
    dynamic_sampling: int = Field(
        default=0,
        ge=0,
        description="Rounds in which an epoch's rows whose attempts all have the same reward, so that none is "
        "better than another, are rolled out again (DAPO's dynamic sampling); 0 is off. The attempts before are "
        "counted as `replaced_group`, and the extra rollouts as `extra_rollouts` in metrics.jsonl.",
    )
    max_concurrency: int | None = Field(
        default=None, ge=1, description="Rollouts in flight at once; default `eval.general.max_concurrency`."
    )
    rollout_timeout: float | None = Field(
        default=None,
        gt=0,
        description="Time limit of one rollout in seconds; slower ones are cut off and counted as `rollout_timeout`.",
    )
    evaluator_timeout: float = Field(
        default=600.0,
        gt=0,
        description="Time limit in seconds for the evaluator to score one rollout; what takes longer is counted as "
        "`evaluator_error`.",
    )


NOT_FOR_CROSS_ENTROPY = frozenset(
    {
        "loss_fn_config",
        "advantage",
        "discount",
        "kl_beta",
        "kl_estimator",
        "target_kl",
        "recompute_logprobs",
        "lr_scaling",
        "failed_groups",
    }
)
"""Settings of the adapter that supervised steps have no use for."""


class EvsysTrainerAdapterConfig(StrictConfig, TrainerAdapterConfig, name="evsys_trainer_adapter"):
    """Trains the policy's LoRA adapter on rewarded trajectory groups, or on preference pairs with DPO."""

    policy: LLMRef = Field(description="Name of the `evsys_policy` LLM to train.")
    reward: RewardFunctionConfig | None = Field(
        default=None,
        description="`name:` of the evaluator that rewards this policy; default `finetuning.reward_function`.",
    )
    loss_fn: Literal["importance_sampling", "ppo", "cispo", "dro", "gspo", "cross_entropy"] = Field(
        default="importance_sampling",
        description="Loss of rewarded trajectories, by Tinker's name. `cross_entropy` is supervised: it learns every "
        "reply alike, whatever its reward. Preference pairs use DPO's.",
    )
    retokenize: bool = Field(
        default=False,
        description="Train also on trajectories that have text and no token ids, as the tokens of their text. The "
        "model may have sampled other tokens of the same text (`drift`, measured where its own are recorded). Such "
        "Datums are counted apart (`retokenized_datums` in metrics.jsonl). Missing logprobs are taken from the policy "
        "as it is at the job's start.",
    )
    loss_fn_config: dict[str, float] | None = Field(
        default=None, description="Settings of the loss, by Tinker's names (e.g. clip_low_threshold)."
    )
    dpo_beta: float = Field(
        default=0.1,
        gt=0,
        allow_inf_nan=False,
        description="DPO's beta, for preference pairs: the cost of moving away from the policy at the job's start.",
    )
    dpo_batch_size: int = Field(
        default=8, ge=1, description="Preference pairs per optimizer step; `groups_per_step` is for rewarded groups."
    )
    learning_rate: float = Field(default=defaults.LEARNING_RATE, gt=0, description=f"AdamW learning rate. {_BY_WIDTH}")
    beta1: float = Field(default=defaults.BETA1, ge=0, lt=1, description="AdamW beta1.")
    beta2: float = Field(default=defaults.BETA2, ge=0, lt=1, description="AdamW beta2.")
    eps: float = Field(default=defaults.EPS, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(default=defaults.WEIGHT_DECAY, ge=0, description="AdamW decoupled weight decay.")
    grad_clip_norm: float = Field(
        default=defaults.GRAD_CLIP_NORM, ge=0, description="Clip the gradient's global norm to this; 0 is off."
    )
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = Field(
        default="constant",
        description="How the learning rate falls over the run's `num_epochs`: not at all, or to zero at its end; `wsd` "
        "(warmup-stable-decay) in the second half.",
    )
    lr_warmup: int | None = Field(
        default=None,
        ge=0,
        description="Optimizer steps over which the learning rate rises: step k runs at k / `lr_warmup` of it. "
        "0: none. Default: so many that it rises by 1.25e-4 a step (4 at 5e-4), but 16 at most.",
    )
    lr_scaling: Literal["unsolved", "none"] = Field(
        default="unsolved",
        description="`unsolved`: where k of a step's N groups are missing since all of their replies earned the "
        "epoch's highest reward, it runs at sqrt((N - k) / N) of the learning rate, so that the last few groups with a "
        "signal do not undo what is learned. Of a step's empty places, solved groups have their share of the epoch's "
        "groups without a signal, but no more than there are. `none`: at all of it. Under `curriculum_learning`, which "
        "drops such groups first, none is counted.",
    )
    normalization: Literal["full_step", "tokens", "sequences", "sum"] = Field(
        default="full_step",
        description="Divisor of the loss. `full_step`: the tokens of an average full step, so that neither dropped "
        "groups nor long replies change the weight of a token (Dr. GRPO). `tokens`: the step's own tokens (DAPO). "
        "`sequences`: each trajectory's own tokens, then the number of trajectories (GRPO). `sum`: 1 (Tinker's own "
        "sum). See training.md.",
    )
    advantage: Literal["group_mean", "group_mean_std", "leave_one_out", "maxrl", "reward"] = Field(
        default="group_mean_std",
        description="`group_mean_std`: reward minus the group's mean, divided by the group's standard deviation "
        "(GRPO). `group_mean`: not divided (Dr. GRPO). `leave_one_out`: reward minus the mean of the group's other "
        "rewards (RLOO). `maxrl`: reward minus the group's mean, divided by that mean, so that a rare success weighs "
        "still more (MaxRL). `reward`: the reward itself.",
    )
    failed_groups: Literal["drop", "batch_mean"] = Field(
        default="drop",
        description="Groups whose trajectories all earned the same, less than the epoch's mean reward. `drop`: they "
        "have no advantage and are left out, as all groups of equal rewards are. `batch_mean`: their advantage is that "
        "of their reward among all of the epoch's, so that what fails becomes less likely.",
    )
    kl_beta: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the KL penalty that pulls the policy to the base model. Costs a forward pass.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1",
        description="Estimator of that KL. `k1`: the log-ratio, as part of the reward. `k2`: half its square. `k3`: "
        "GRPO's, never negative. `k2` and `k3` cost a second forward pass.",
    )
    target_kl: float | None = Field(
        default=defaults.TARGET_KL,
        gt=0,
        description="How far an epoch may move the policy from the one that sampled (on recorded traces: from the one "
        "at the epoch's start): KL in nats per token. Above it, the epoch's remaining steps are skipped and their "
        "calls counted as `moved_too_far`. Above half of it, the learning rate of the next epochs falls; below half, "
        "it rises again, up to `learning_rate`. `null`: no limit.",
    )
    discount: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Weight of a reward one call before it was earned; below 1, later calls get more of the credit. "
        "A step reward (`step_rewards` in the evaluator's reasoning, one per call) credits its own and earlier calls.",
    )
    mask_truncated: bool = Field(
        default=False,
        description="Leave replies that were cut off (at `max_tokens`, the context's end, or where the workflow "
        "stopped reading a stream) out of the loss; their rewards still count in the group's mean.",
    )
    groups_per_step: int | None = Field(
        default=None, ge=1, description="Trajectory groups per optimizer step; default: all of the epoch's groups."
    )
    passes: int = Field(default=1, ge=1, description="Passes over an epoch's trajectories (or preference pairs).")
    shuffle_seed: int = Field(default=0, description="Seed for shuffling the groups or pairs.")
    save_datums: bool = Field(
        default=False,
        description="Write every trained Datum (token ids, logprobs, advantages) to the run directory: as the rollouts "
        "give it, before `recompute_logprobs`, `kl_beta` and `normalization` change its logprobs and advantages.",
    )
    merge_calls: bool = Field(
        default=True,
        description="Train calls whose tokens extend one another as one Datum (same gradient, less work). No effect "
        "with gspo, which has one ratio per Datum.",
    )
    recompute_logprobs: bool = Field(
        default=False,
        description="Recompute the old logprobs of the loss with the learner (one more forward pass over an epoch's "
        "Datums) instead of taking the sampler's. They differ only in rounding, but the sampler's rounding depends on "
        "how concurrent requests share a batch. With this setting the same rollouts give the same weights, so a run "
        "can be repeated.",
    )

    @model_validator(mode="after")
    def _loss_takes_its_settings(self) -> "EvsysTrainerAdapterConfig":
        resolve_loss_fn_config(self.loss_fn, self.loss_fn_config)
        useless = sorted(NOT_FOR_CROSS_ENTROPY & self.model_fields_set) if self.loss_fn == "cross_entropy" else []
        if useless:
            raise ValueError(
                f"loss_fn `cross_entropy` compares nothing and has no ratios, so {', '.join(useless)} would have no "
                "effect; remove it, or choose another loss_fn"
            )
        of_groups = {"lr_scaling": "none", "failed_groups": "drop"} if self.advantage == "reward" else {}
        for name in sorted(of_groups.keys() & self.model_fields_set):
            if getattr(self, name) != of_groups[name]:
                raise ValueError(
                    f"{name} `{getattr(self, name)}` has no effect with advantage `reward`, which compares no groups "
                    f"and leaves none out; remove {name}"
                )
        if self.kl_estimator != "k1" and not self.kl_beta:
            raise ValueError("kl_estimator has no effect without kl_beta; set kl_beta above 0, or remove kl_estimator")
        if self.loss_fn == "dro" and self.normalization == "sequences":
            raise ValueError(
                "loss_fn `dro` has no normalization `sequences`: its quadratic term has one weight for all tokens; "
                "choose full_step, tokens or sum"
            )
        return self


class WarmStartConfig(StrictConfig):
    """Training on demonstrations before the first epoch, so that rollouts start to earn rewards."""

    algorithm: Literal["sft", "sdft"] = Field(
        default="sft",
        description="`sft`: learn every assistant message. `sdft`: self-distillation, in which the policy with the "
        "last assistant message in its context teaches the policy without it (needs a model that follows its context).",
    )
    demonstrations: Path = Field(
        description="JSON or JSON-lines file of `{messages: [...], tools: [...]}` in OpenAI form."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the demonstrations.")
    batch_size: int = Field(default=8, ge=1, description="Demonstrations per optimizer step.")
    learning_rate: float = Field(
        default=defaults.LEARNING_RATE, gt=0, description=f"AdamW learning rate; decays linearly to zero. {_BY_WIDTH}"
    )
    seed: int = Field(default=0, description="Seed for shuffling the demonstrations (and for sdft's samples).")
    candidates: int = Field(default=64, ge=1, description="`sdft`: tokens per position in the reverse KL.")

    @model_validator(mode="after")
    def _candidates_are_of_sdft(self) -> "WarmStartConfig":
        if self.algorithm != "sdft" and "candidates" in self.model_fields_set:
            raise ValueError(f"candidates has no effect with algorithm `{self.algorithm}`; remove it")
        return self


class EvsysTrainerConfig(RunRewardedConfig, TrainerConfig, name="evsys_trainer"):
    """Runs the epochs: warm start, rollouts, training, validation, checkpoints, resume and the reports."""

    validation_dataset: Path | dict[str, Any] | None = Field(
        default=None,
        description="Held-out dataset, scored before, during and after training, and also before a warm start: a "
        "`.json`, `.jsonl`, `.csv`, `.parquet` or `.xlsx` file, or settings as under `eval.general.dataset` (`_type`, "
        "`file_path`, …). `--validation_dataset` overrides it.",
    )
    validation_interval: int | None = Field(
        default=None,
        ge=1,
        description="Validate every N epochs; default 5. `--validation_interval` on the command line overrides it.",
    )
    score_training_rows: bool = Field(
        default=True,
        description="Score one attempt at each training row before the first epoch and after the last. `false` saves "
        "the time where a `validation_dataset` measures the policy.",
    )
    warm_start: WarmStartConfig | None = Field(default=None, description="Supervised warm start; default none.")
    resume: bool | Literal["previous"] = Field(
        default=False,
        description="Continue the newest run from its last finished epoch. `previous`: if that epoch's checkpoint or "
        "the run's state is damaged, continue from the newest one before it that is whole.",
    )
    overlap_rollouts: bool = Field(
        default=False,
        description="Collect the next epoch's rollouts while an epoch trains. Calls are then up to one epoch's "
        "optimizer steps old when they are trained on (`staleness` in metrics.jsonl counts the steps), and the loss is "
        "`ppo` unless the adapter's `loss_fn` is set.",
    )
    on_collapse: Literal["continue", "stop", "reload_best"] = Field(
        default="continue",
        description="What to do when the policy has lost what it had learned (the console says so in any case). "
        "`continue`: nothing. `stop`: end the run with an error that names the best checkpoint. `reload_best`: load "
        "the best measured checkpoint (see `validation_interval`) and continue at half the learning rate.",
    )
    also_train: list[TrainerAdapterRef] = Field(
        default_factory=list,
        description="Further trainer adapters: each trains its own policy on the same rollouts, by the evaluator that "
        "its `reward` names (default: `finetuning.reward_function`). See agents.md.",
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="Epoch checkpoints to keep in addition to the last and the best."
    )
    keep_rollouts: int | None = Field(
        default=64,
        ge=0,
        description="Training rollouts to keep in `rollouts/`: those of the first N dataset rows of each epoch; null "
        "keeps all. Held-out rows are always kept.",
    )
    seed: int = Field(
        default=0, description="Seed of curriculum subsampling. See training.md for the other seeds of a run."
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list,
        description="Experiment trackers that get the metrics, the configuration and held-out samples. Each is an "
        "extra (`pip install 'nat_plugin_evsys[wandb]'`) and reads its own environment variables (WANDB_MODE, "
        "MLFLOW_TRACKING_URI, …). By default tensorboard writes to the run directory and mlflow to `mlruns` beside it. "
        "Failures to reach a tracker are counted and never stop a run.",
    )
    progress: Literal["auto", "rich", "plain", "none"] = Field(
        default="auto", description="`auto`: a live display on a terminal, plain lines in a pipe."
    )

    @model_validator(mode="after")
    def _reloading_needs_fresh_rollouts(self) -> "EvsysTrainerConfig":
        if self.overlap_rollouts and self.on_collapse == "reload_best":
            raise ValueError(
                "on_collapse `reload_best` does not go with overlap_rollouts: the next rollouts would come from the "
                "collapsed policy; set overlap_rollouts: false, or on_collapse: stop"
            )
        return self
