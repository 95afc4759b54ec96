"""From trajectories to the work of a job: policy gradients on groups, or DPO on preference pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from nat.data_models.finetuning import Trajectory

from nat_plugin_evsys.config import EvsysTrainerAdapterConfig
from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.rollouts.preferences import preference_trajectories
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup, group_of
from nat_plugin_evsys.training.step_size import StepSize, warmup_of

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.backends.base import Backend
    from nat_plugin_evsys.rollouts.plain_episodes import RecordedRows, Renderer
    from nat_plugin_evsys.training.dpo import DpoSettings
    from nat_plugin_evsys.training.learning_rate import LearningRate
    from nat_plugin_evsys.training.policy_gradient import TrainingSettings
    from nat_plugin_evsys.training.work import Material, TrainingWork

NOT_FOR_PAIRS = (
    "loss_fn",
    "loss_fn_config",
    "normalization",
    "lr_scaling",
    "advantage",
    "failed_groups",
    "discount",
    "mask_truncated",
    "recompute_logprobs",
    "kl_beta",
    "kl_estimator",
    "target_kl",
    "groups_per_step",
    "merge_calls",
)
"""Settings that preference pairs have no use for; refused with them unless they have their defaults."""


class PolicyUnderTraining(Protocol):
    """What the adapter needs from the policy."""

    @property
    def backend(self) -> Backend:
        """The live training client; available once ``ensure_loaded`` has returned."""
        ...

    @property
    def renderer(self) -> Renderer:
        """Messages -> token ids; available once ``ensure_loaded`` has returned."""
        ...

    async def ensure_loaded(self) -> None:
        """Load the model unless it is loaded."""
        ...

    async def publish(self, name: str | None = None) -> int:
        """Serve the current weights as the next policy version and return its number."""
        ...

    async def is_healthy(self) -> bool:
        """True when the backend answers a real request."""
        ...


def groups_of(rows: list[list[Trajectory]]) -> list[TrajectoryGroup]:
    """One group for each dataset row that has a trajectory.

    Raises:
        ValueError: there is no trajectory at all, or one is invalid.
    """
    groups = [group_of(row, index) for index, row in enumerate(rows) if row]
    if not groups:
        raise DataError(
            "the collection has no trajectories, so there is nothing to train on; look at the dropped rollouts of "
            "the trajectory builder"
        )
    return groups


class JobWork:
    """Makes the work of jobs on one policy with one adapter's settings.

    Args:
        num_epochs: of the run that the jobs belong to; None without a run.

    Attributes:
        rate_factor: factor on the learning rate; a run lowers it when its policy has collapsed.
        step_size: what earlier jobs have measured about the learning rate.
        on_records: whether the groups are records of another sampler than the policy.
    """

    def __init__(
        self, config: EvsysTrainerAdapterConfig, policy: PolicyUnderTraining, num_epochs: int | None = None
    ) -> None:
        self._config = config
        self._num_epochs = num_epochs
        self._policy = policy
        self.rate_factor = 1.0
        self.on_records = False
        target = None if config.loss_fn == "cross_entropy" else config.target_kl
        warmup = warmup_of(config.learning_rate) if config.lr_warmup is None else config.lr_warmup
        self.step_size = StepSize(target, warmup=warmup)

    def on_groups(self, recorded: RecordedRows, epoch: int | None) -> tuple[TrainingWork, dict[str, int]]:
        """Policy-gradient steps (with ``cross_entropy``, supervised ones) on groups, and their sizes for the ledger.

        Raises:
            ValueError: there is no trajectory at all, or one is invalid.
        """
        from nat_plugin_evsys.training.group_material import GroupMaterial

        groups = groups_of(recorded.rows)
        work = self._work_on(GroupMaterial(groups, self._settings(epoch), recorded.left_out, recorded.drift))
        trajectories = sum(len(group.rewards_G) for group in groups) + recorded.left_out.total()
        calls = sum(group.num_calls for group in groups)
        return work, {"groups": len(groups), "trajectories": trajectories, "calls": calls}

    def on_pairs(self, rows: list[list[Trajectory]], epoch: int | None) -> tuple[TrainingWork, dict[str, int]]:
        """DPO steps on preference pairs, and their sizes for the ledger.

        Raises:
            ConfigError: a setting that has no effect on pairs.
            ValueError: rows that mix pairs with episodes, or an invalid trajectory.
        """
        from nat_plugin_evsys.training.pair_material import PairMaterial

        fields = type(self._config).model_fields
        useless = [name for name in NOT_FOR_PAIRS if getattr(self._config, name) != fields[name].default]
        if useless:
            raise ConfigError(
                f"the collection holds DPO preference pairs, for which {', '.join(useless)} would have no effect; "
                "remove it from the trainer adapter's config (pairs are trained by dpo_beta and dpo_batch_size)"
            )
        found = preference_trajectories(rows)
        work = self._work_on(PairMaterial(found, self._dpo_settings(epoch), lambda: self._policy.renderer))
        pairs = sum(len(trajectory.items) for trajectory in found)
        groups = len({trajectory.group for trajectory in found})
        return work, {"groups": groups, "trajectories": len(found), "calls": 0, "pairs": pairs}

    def _work_on(self, material: Material) -> TrainingWork:
        from nat_plugin_evsys.training.work import TrainingWork

        return TrainingWork(material, self._loaded_backend, self._policy.publish)

    def warmup_notice(self) -> str | None:
        """What to say at the end of a run whose learning rate was still rising, or None."""
        taken, warmup, rate = self.step_size.taken, self.step_size.warmup, self._config.learning_rate
        if not 0 < taken < warmup:
            return None
        steps = f"{taken} optimizer step" + ("" if taken == 1 else "s")
        return (
            f"the run took {steps} and the warm-up takes {warmup}, so the learning rate reached at most "
            f"{taken}/{warmup} of {rate:g}; run more epochs, or set `lr_warmup` on the trainer adapter"
        )

    async def _loaded_backend(self) -> Backend:
        await self._policy.ensure_loaded()
        return self._policy.backend

    def _settings(self, epoch: int | None) -> TrainingSettings:
        from nat_plugin_evsys.training.policy_gradient import TrainingSettings

        config = self._config
        return TrainingSettings(
            loss_fn=config.loss_fn,
            loss_fn_config=config.loss_fn_config,
            adam=self._adam(),
            rate=self._rate(epoch),
            normalization=config.normalization,
            lr_scaling=config.lr_scaling,
            advantage=config.advantage,
            failed_groups=config.failed_groups,
            groups_per_step=config.groups_per_step,
            passes=config.passes,
            shuffle_key=self._shuffle_key(epoch),
            merge_calls=config.merge_calls,
            recompute_logprobs=config.recompute_logprobs,
            sampled_elsewhere=self.on_records,
            discount=config.discount,
            mask_truncated=config.mask_truncated,
            kl_beta=config.kl_beta,
            kl_estimator=config.kl_estimator,
            step_size=self.step_size,
        )

    def _dpo_settings(self, epoch: int | None) -> DpoSettings:
        from nat_plugin_evsys.training.dpo import DpoSettings

        config = self._config
        return DpoSettings(
            adam=self._adam(),
            rate=self._rate(epoch),
            beta=config.dpo_beta,
            batch_size=config.dpo_batch_size,
            passes=config.passes,
            seed=self._shuffle_key(epoch),
            step_size=self.step_size,
        )

    def _rate(self, epoch: int | None) -> LearningRate:
        """The part of the run's schedule that this epoch covers; outside a run the rate is constant."""
        from nat_plugin_evsys.training.learning_rate import LearningRate

        config, epochs = self._config, self._num_epochs
        peak = config.learning_rate * self.rate_factor
        if epochs is None or epoch is None:
            return LearningRate(peak)
        at = min(epoch, epochs - 1)
        return LearningRate(peak, config.lr_schedule, at / epochs, (at + 1) / epochs)

    def _adam(self) -> types.AdamParams:
        from tinker import types

        names = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
        return types.AdamParams(**{name: getattr(self._config, name) for name in names})

    def _shuffle_key(self, epoch: int | None) -> str:
        return f"{self._config.shuffle_seed}/{epoch or 0}"
