"""How trajectory groups are trained on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tinker import types

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.rollouts.advantages import AdvantageMethod, FailedGroups
from nat_plugin_evsys.training.kl import KlEstimator
from nat_plugin_evsys.training.learning_rate import LearningRate
from nat_plugin_evsys.training.normalization import Normalization
from nat_plugin_evsys.training.step_size import LrScaling, StepSize


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How groups are trained on.

    Attributes:
        loss_fn: importance_sampling, ppo, cispo, dro, gspo, or cross_entropy, which learns every reply alike.
        adam: of every optimizer step, except for the learning rate.
        rate: the learning rate over the steps, default that of ``adam``.
        normalization: how much a token weighs; see ``normalization``.
        loss_fn_config: the loss's settings, by Tinker's names.
        lr_scaling: ``unsolved`` multiplies the rate of each step by ``step_size.unsolved_factor``.
        advantage: see ``group_advantages``.
        failed_groups: ``batch_mean`` trains on groups that failed, with ``failed_advantage``; ``drop`` does not.
        groups_per_step: groups of one optimizer step; None takes all in one.
        passes: times that the groups are trained on.
        shuffle_key: decides the order of the groups, together with the number of the pass.
        merge_calls, discount, mask_truncated: see ``group_datums``.
        recompute_logprobs: the loss's old logprobs are the learner's, computed before the first step, in place of the
            sampler's; see ``training.md``. Only for rollouts of the policy that is trained.
        sampled_elsewhere: the groups are records, whose sampler may be far from the policy before any step: the KL of
            ``step_size`` is that to the policy before the first step, which takes one more forward pass.
        kl_beta, kl_estimator: the pull to the base model; see ``kl``.
        step_size: multiplies the learning rate, counts the steps, and learns from each collection of rollouts. The
            steps after the first one end where the policy's KL to the sampler (``kl_v2:mean``, in nats a token) is
            above its ``target``.

    Raises:
        ConfigError: ``dro`` with ``sequences``, whose scales differ between Datums; or a value is out of range.
    """

    loss_fn: types.LossFnType
    adam: types.AdamParams
    rate: LearningRate | None = None
    normalization: Normalization = "full_step"
    loss_fn_config: dict[str, Any] | None = None
    lr_scaling: LrScaling = "none"
    advantage: AdvantageMethod = "group_mean"
    failed_groups: FailedGroups = "drop"
    groups_per_step: int | None = None
    passes: int = 1
    shuffle_key: str = "0"
    merge_calls: bool = True
    discount: float = 1.0
    mask_truncated: bool = False
    recompute_logprobs: bool = False
    sampled_elsewhere: bool = False
    kl_beta: float = 0.0
    kl_estimator: KlEstimator = "k1"
    step_size: StepSize = field(default_factory=StepSize)

    def __post_init__(self) -> None:
        if self.loss_fn == "dro" and self.normalization == "sequences":
            raise ConfigError(
                "loss_fn dro takes no normalization `sequences`: its quadratic term has one weight for all tokens; "
                "choose full_step, tokens or sum"
            )
        target, warmup = self.step_size.target, self.step_size.warmup
        if self.kl_beta < 0 or (target is not None and target <= 0) or warmup < 0:
            raise ConfigError(
                f"kl_beta is {self.kl_beta}, step_size.target {target} and step_size.warmup {warmup}; kl_beta and the "
                "warm-up must be 0 or more, and the target above 0 or None"
            )
