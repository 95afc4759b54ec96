"""What an optimizer step reads: the Datums of its groups, with the final advantages, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from tinker import Datum, TensorData, types

from nat_plugin_evsys.backends.base import Backend
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.loss_config import resolve_loss_fn_config
from nat_plugin_evsys.rollouts.datum_logprobs import with_missing_logprobs, with_prompt_logprobs, with_sampled_logprobs
from nat_plugin_evsys.rollouts.datums import DatumSet, Provenance
from nat_plugin_evsys.training.kl import kl_penalised, kl_v2, mean_kl, mean_square_gap
from nat_plugin_evsys.training.loop import NamedLoss
from nat_plugin_evsys.training.normalization import Normalization, datum_scales, scaled
from nat_plugin_evsys.training.training_settings import TrainingSettings

READ_BY_A_FORWARD = ("target_tokens", "temperature")

MEASURED_TOKENS, MEASURED_DATUMS = 256, 8
"""A forward pass over all Datums, only to see how far a step has moved the policy, would be a third of the step."""

_Fill = Callable[[Datum, Provenance, TensorData], Datum]
"""``(datum, where it is from, the learner's logprobs) -> a copy with some of them``."""


class StepData:
    """Makes the Datums of the steps on some groups.

    Args:
        backend: asked for logprobs where the loss or the KL needs them.
        sets: the Datums of each group.
        settings: how they are trained on.

    Attributes:
        places: groups of a full step.
    """

    def __init__(self, backend: Backend, sets: Sequence[DatumSet], settings: TrainingSettings) -> None:
        self._backend = backend
        self._settings = settings
        self.places = settings.groups_per_step or len(sets)
        lengths = [datums.sampled_tokens for datums in sets if datums.datums]
        # Sampled tokens of a step that has all its groups, at the job's mean length of a group.
        self._full_step_tokens = self.places * sum(lengths) / max(len(lengths), 1)

    async def of(self, batch: Sequence[DatumSet]) -> tuple[list[Datum], NamedLoss, dict[str, float]]:
        """The Datums of a step on ``batch``, the loss, and what was measured on the way to them."""
        settings = self._settings
        data, origins = _together(batch)
        measured = {}
        if settings.kl_beta:
            base = await self._backend.base_logprobs_async(data)
            data, measured["kl_base:mean"] = await self._pulled(data, origins, base)
        scales = _scales(batch, settings.normalization, self._full_step_tokens)
        data = [scaled(datum, scale) for datum, scale in zip(data, scales, strict=True)]
        if settings.loss_fn == "cross_entropy":
            return [_weighted(datum) for datum in data], NamedLoss("cross_entropy"), measured
        if settings.loss_fn != "dro":
            return data, NamedLoss(settings.loss_fn, settings.loss_fn_config), measured
        # It has no mask, so its prompt rows get the learner's present logprobs.
        learner = await self._learner(data)
        data = [with_prompt_logprobs(*row) for row in zip(data, origins, learner, strict=True)]
        beta = resolve_loss_fn_config("dro", settings.loss_fn_config)["beta"]
        return data, NamedLoss(settings.loss_fn, {"beta": beta * scales[0]}), measured

    async def recomputed(self, sets: Sequence[DatumSet]) -> list[DatumSet]:
        """``sets`` with the present policy's logprobs of the sampled tokens, from one forward pass over all Datums.

        Raises:
            DataError: another policy sampled some of them, whose logprobs the present one cannot know.
        """
        _, origins = _together(sets)
        version = self._backend.policy_version
        spans = [span for origin in origins for span in origin.spans if not span.logprobs_unknown]
        others = {span.policy_version for span in spans} - {version}
        if others:
            raise DataError(
                f"recompute_logprobs is for rollouts of the policy that is trained, which is version {version}, but "
                f"there are calls of version {', '.join(map(str, sorted(others)))} (0 also where an episode's item has "
                "no `policy_version` in its metadata); set recompute_logprobs: false"
            )
        return await self._with_learner(sets, with_sampled_logprobs)

    async def completed(self, sets: Sequence[DatumSet]) -> list[DatumSet]:
        """``sets`` with the present policy's logprobs where the sampler's are unknown; a forward pass over those."""
        unknown = [any(origin.logprobs_unknown for origin in datums.provenance) for datums in sets]
        done = iter(await self._with_learner([each for each, yes in zip(sets, unknown, strict=True) if yes]))
        return [next(done) if yes else datums for datums, yes in zip(sets, unknown, strict=True)]

    async def _with_learner(self, sets: Sequence[DatumSet], fill: _Fill = with_missing_logprobs) -> list[DatumSet]:
        data, _ = _together(sets)
        learner = iter(await self._learner(data) if data else [])
        return [
            replace(
                datums,
                datums=[
                    fill(datum, origin, next(learner))
                    for datum, origin in zip(datums.datums, datums.provenance, strict=True)
                ],
            )
            for datums in sets
        ]

    async def at_start(self, sets: Sequence[DatumSet]) -> list[DatumSet]:
        """``sets`` with the present policy's logprobs, whoever sampled them; one forward pass over all Datums."""
        return await self._with_learner(sets, with_sampled_logprobs)

    def moved(
        self, before: Sequence[DatumSet], data: Sequence[Datum], output: types.ForwardBackwardOutput
    ) -> float | None:
        """How far the policy is from the one whose logprobs ``before`` has, by the step that trains on its ``data``.

        It is the service's ``kl_v2:mean``, or computed likewise from the learner's logprobs; None where a service gives
        neither.
        """
        if not self._settings.sampled_elsewhere and "kl_v2:mean" in output.metrics:
            return output.metrics["kl_v2:mean"]
        return kl_v2([datum.loss_fn_inputs["logprobs"] for datum in _together(before)[0]], data, output.loss_fn_outputs)

    async def kl_from(self, before: Sequence[DatumSet]) -> float:
        """How far the present policy is from the one whose logprobs ``before`` has: one forward pass over some Datums.

        It is ``kl_v2:mean``, with the tokens whose advantage is 0, over as many of the first Datums as have
        ``MEASURED_TOKENS`` sampled tokens, but no fewer than ``MEASURED_DATUMS``.
        """
        data, origins = _together(before)
        totals = np.cumsum([origin.sampled_tokens for origin in origins])
        enough = max(int(np.searchsorted(totals, MEASURED_TOKENS)) + 1, MEASURED_DATUMS)
        data, origins = data[:enough], origins[:enough]
        logprobs = [datum.loss_fn_inputs["logprobs"] for datum in data]
        return mean_square_gap(logprobs, await self._learner(data), origins) / 2

    async def _pulled(
        self, data: list[Datum], origins: Sequence[Provenance], base: Sequence[TensorData]
    ) -> tuple[list[Datum], float]:
        """Copies of the Datums with the pull in their advantages, and how far the policy is from the base model.

        The sampler of records is not the policy, so both are of the learner there: k1 has the c of k2.
        """
        estimator = self._settings.kl_estimator
        if self._settings.sampled_elsewhere and estimator == "k1":
            estimator = "k2"
        learner = [None] * len(data) if estimator == "k1" else await self._learner(data)
        pulled = [
            kl_penalised(datum, origin, of_base, self._settings.kl_beta, estimator=estimator, learner=of_learner)
            for datum, origin, of_base, of_learner in zip(data, origins, base, learner, strict=True)
        ]
        sampler = [datum.loss_fn_inputs["logprobs"] for datum in data]
        policy = [each for each in learner if each is not None] if self._settings.sampled_elsewhere else sampler
        return pulled, mean_kl(policy, base, origins)

    async def _learner(self, data: Sequence[Datum]) -> list[TensorData]:
        """Logprobs of the target tokens under the present weights, (N,) each."""
        bare = [
            Datum(datum.model_input, {k: v for k, v in datum.loss_fn_inputs.items() if k in READ_BY_A_FORWARD})
            for datum in data
        ]
        output = await self._backend.forward_async(bare, loss_fn="cross_entropy")
        return [result["logprobs"] for result in output.loss_fn_outputs]


def _weighted(datum: Datum) -> Datum:
    """The same for ``cross_entropy``, which has weights where the others have advantages."""
    inputs = datum.loss_fn_inputs
    return Datum(datum.model_input, {"target_tokens": inputs["target_tokens"], "weights": inputs["advantages"]})


def _together(sets: Sequence[DatumSet]) -> tuple[list[Datum], list[Provenance]]:
    """The Datums of all sets, and where each comes from."""
    return [datum for each in sets for datum in each.datums], [origin for each in sets for origin in each.provenance]


def _scales(batch: Sequence[DatumSet], normalization: Normalization, full_step_tokens: float) -> list[float]:
    origins = [(group, origin) for group, datums in enumerate(batch) for origin in datums.provenance]
    lengths = [origin.sampled_tokens for _, origin in origins]
    places = {key: number for number, key in enumerate(dict.fromkeys((group, o.trajectory) for group, o in origins))}
    trajectories = [places[group, origin.trajectory] for group, origin in origins]
    return datum_scales(lengths, trajectories, normalization, full_step_tokens=full_step_tokens)
