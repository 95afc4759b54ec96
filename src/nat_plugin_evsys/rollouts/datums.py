"""Recorded calls -> Datums. Token ids and logprobs are exactly the recorded ones."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinker import Datum, ModelInput, TensorData
from tinker.types import EncodedTextChunk, ImageChunk

from nat_plugin_evsys.call_images import CallImage, file_of, placed_before, split_at_images
from nat_plugin_evsys.calls import Call, CallKey, DropReason
from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.rollouts.advantages import (
    AdvantageMethod,
    call_advantages,
    failed_advantage,
    has_zero_variance,
)
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup

LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo")
"""Losses that read sampler logprobs and advantages."""

PER_SEQUENCE_LOSSES = frozenset({"gspo"})
"""Losses with one ratio per Datum: merging calls would average the ratio over turns, so each call stays a Datum."""


@dataclass(frozen=True, slots=True)
class CallSpan:
    """One call's sampled tokens within a Datum: rows ``start:stop`` of target_tokens.

    Attributes:
        forced: those of the rows that carry no loss, because a grammar left one choice.
        retokenized, logprobs_unknown: see ``Call``.
    """

    call_id: str
    index: int
    policy_version: int
    start: int
    stop: int
    forced: tuple[int, ...] = ()
    retokenized: bool = False
    logprobs_unknown: bool = False

    @property
    def rows(self) -> NDArray[np.int64]:
        """The rows that carry a loss."""
        return np.setdiff1d(np.arange(self.start, self.stop), self.forced, assume_unique=True)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a Datum comes from."""

    group: str
    trajectory: int
    spans: list[CallSpan]

    @property
    def sampled_tokens(self) -> int:
        """Number of rows with an advantage."""
        return sum(span.stop - span.start - len(span.forced) for span in self.spans)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Those rows."""
        return np.concatenate([span.rows for span in self.spans])

    @property
    def retokenized(self) -> bool:
        """Whether any of its replies was tokenised again."""
        return any(span.retokenized for span in self.spans)

    @property
    def logprobs_unknown(self) -> bool:
        """Whether the sampler's logprobs of any of its replies are unknown."""
        return any(span.logprobs_unknown for span in self.spans)


@dataclass(slots=True)
class DatumSet:
    """The Datums of a group and where every call went: ``calls == trained_calls + sum(dropped.values())``.

    Attributes:
        datums: length D.
        provenance: of each Datum, length D.
        calls: recorded calls that came in.
        dropped: calls left out, by reason.
        dropped_trajectories: trajectories without any Datum, by reason.
        reasons: why each dropped call was left out.
        silent: whether no trajectory of the group is better than another.
        solved: whether it is silent since every trajectory earned the highest reward of all groups, where not all did.
        failed: whether no trajectory of the group is better than another, but all are worse than the batch's mean.
    """

    datums: list[Datum] = field(default_factory=list)
    provenance: list[Provenance] = field(default_factory=list)
    calls: int = 0
    silent: bool = False
    solved: bool = False
    failed: bool = False
    dropped: Counter[DropReason] = field(default_factory=Counter)
    dropped_trajectories: Counter[DropReason] = field(default_factory=Counter)
    reasons: dict[CallKey, DropReason] = field(default_factory=dict)

    def drop(self, reason: DropReason, calls: Iterable[Call]) -> None:
        """Drop calls under a named reason."""
        for call in calls:
            self.dropped[reason] += 1
            self.reasons[call.key] = reason

    @property
    def trained_calls(self) -> int:
        """Calls whose sampled tokens are in ``datums``."""
        return sum(len(origin.spans) for origin in self.provenance)

    @property
    def trained_trajectories(self) -> int:
        """Trajectories of one group that have a Datum."""
        return len({origin.trajectory for origin in self.provenance})

    @property
    def tokens(self) -> int:
        """Rows of all Datums together."""
        return sum(datum.model_input.length for datum in self.datums)

    @property
    def sampled_tokens(self) -> int:
        """Rows with an advantage, of all Datums together."""
        return sum(origin.sampled_tokens for origin in self.provenance)


def group_datums(
    group: TrajectoryGroup,
    *,
    advantage: AdvantageMethod,
    loss_fn: str = "importance_sampling",
    merge_calls: bool = True,
    discount: float = 1.0,
    mask_truncated: bool = False,
    keep_silent: bool = False,
    batch: Sequence[float] = (),
) -> DatumSet:
    """The Datums of one group.

    A group without any advantage under the group methods is silent. It is left out (``zero_variance_group``, or
    ``single_trajectory_group`` if it has only one trajectory) unless ``keep_silent``: a KL penalty still has a gradient
    there, and pulls hardest where all replies to a row are the same.

    Args:
        advantage: see ``group_advantages``.
        loss_fn: one of ``LOSSES``.
        merge_calls: make one Datum of calls whose tokens extend one another (not for ``PER_SEQUENCE_LOSSES``).
        discount: of rewards by the calls between; see ``advantages``.
        mask_truncated: leave out calls that ended at the token limit (``truncated``), as DAPO's overlong filtering
            (arXiv 2503.14476, section 3.4). Their trajectory's reward stays in the group's mean.
        batch: ``first_returns`` of all groups. A silent group of two trajectories or more that is below their mean is
            trained on with ``failed_advantage``; without ``batch`` none is.

    Raises:
        DataError: unknown loss, or not one step reward per call.
    """
    if loss_fn not in LOSSES:
        raise DataError(f"no Datums for loss_fn `{loss_fn}`; it must be one of {', '.join(LOSSES)}")
    result = DatumSet(calls=group.num_calls)
    if not group.rewards_G:
        return result
    calls_G = [len(calls) for calls in group.calls_G]
    advantages_G = call_advantages(
        group.rewards_G, calls_G, advantage, step_rewards_G=group.step_rewards_G, discount=discount
    )
    known = any(calls_G) or has_zero_variance(group.rewards_G)  # or no trajectory has a call, which is said of each
    result.silent = advantage != "reward" and known and not any(any(values) for values in advantages_G)
    if result.silent and batch and len(group.rewards_G) > 1 and any(calls_G):
        earned = next(value for value, calls in zip(group.first_returns(discount), calls_G, strict=True) if calls)
        value = failed_advantage(earned, batch, advantage)
        result.failed, result.silent = value < 0, value == 0
        advantages_G = [[value] * calls for calls in calls_G]
    if result.silent and not keep_silent:
        single = len(group.rewards_G) == 1
        reason = DropReason.SINGLE_TRAJECTORY_GROUP if single else DropReason.ZERO_VARIANCE_GROUP
        result.drop(reason, itertools.chain.from_iterable(group.calls_G))
        result.dropped_trajectories[reason] += len(group.calls_G)
        return result
    merge = merge_calls and loss_fn not in PER_SEQUENCE_LOSSES
    for position, (calls, values) in enumerate(zip(group.calls_G, advantages_G, strict=True)):
        of_call = dict(zip((call.key for call in calls), values, strict=True))
        usable = _usable(calls, result, mask_truncated=mask_truncated)
        if not usable:
            result.dropped_trajectories[DropReason.NO_USABLE_CALLS if calls else DropReason.NO_CALLS] += 1
        for chain in token_chains(usable) if merge else [[call] for call in usable]:
            datum, spans = chain_datum(chain, [of_call[call.key] for call in chain], loss_fn)
            result.datums.append(datum)
            result.provenance.append(Provenance(group=group.name, trajectory=position, spans=spans))
    return result


def token_chains(calls: list[Call]) -> list[list[Call]]:
    """Group calls so that in each chain a call's prompt starts with all tokens (prompt and output) of the one before,
    and shows the same images in them.

    A call extends the longest chain possible; chains grow only at their ends. Each call is in exactly one chain.
    """
    chains: list[list[Call]] = []
    tokens: list[list[int]] = []
    for call in calls:
        fitting = [i for i, ids in enumerate(tokens) if call.prompt_ids[: len(ids)] == ids and _shows(call, chains[i])]
        full = call.prompt_ids + call.output_ids
        if fitting:
            longest = max(fitting, key=lambda i: len(tokens[i]))
            chains[longest].append(call)
            tokens[longest] = full
        else:
            chains.append([call])
            tokens.append(full)
    return chains


def _shows(call: Call, chain: list[Call]) -> bool:
    """Whether a call whose prompt has a chain's tokens has its images too."""
    images, tokens = chain[-1].images, len(chain[-1].prompt_ids)
    return placed_before(call.images, tokens) == placed_before(images, tokens)


def chain_datum(
    chain: list[Call], advantage: float | Sequence[float], loss_fn: str = "importance_sampling"
) -> tuple[Datum, list[CallSpan]]:
    """One Datum of a chain of calls, aligned as Tinker aligns it.

    With ``t`` the n tokens of the last call (prompt and output): ``model_input = t[:-1]`` and, all of shape (n-1,),
    ``target_tokens = t[1:]`` (int64, with images' placeholders), ``logprobs`` (the sampler's at sampled tokens, 0
    at prompt tokens, float32),
    ``advantages`` (``advantage``, or that of the call, at sampled tokens, else 0, float32). ``gspo`` also gets
    ``sequence_ratio_mask`` (1 at sampled tokens, float32). Calls that were sampled at another temperature than 1 add
    ``temperature`` (the call's at sampled tokens, else 1, float32), so that the learner's distribution has it too; at
    temperature 0 the recorded logprobs are those of temperature 1. A token that a grammar forced has advantage 0 and is
    outside the mask, as a prompt token is. Under every loss but ``dro`` a row with advantage 0
    adds nothing; for ``dro`` see ``datum_logprobs.with_prompt_logprobs``.

    Several policy versions in one Datum are fine: logprobs are per token.
    """
    ids = chain[-1].prompt_ids + chain[-1].output_ids
    rows = len(ids) - 1
    logprobs = np.zeros(rows, dtype=np.float32)
    advantages = np.zeros(rows, dtype=np.float32)
    temperature = np.ones(rows, dtype=np.float32)
    sampled = np.zeros(rows, dtype=bool)
    spans = []
    values = [advantage] * len(chain) if isinstance(advantage, int | float) else advantage
    for call, value in zip(chain, values, strict=True):
        start = len(call.prompt_ids) - 1
        stop = start + len(call.output_ids)
        span = CallSpan(
            call_id=call.call_id,
            index=call.index,
            policy_version=call.policy_version,
            start=start,
            stop=stop,
            forced=tuple(start + position for position in call.forced),
            retokenized=call.retokenized,
            logprobs_unknown=call.logprobs_unknown,
        )
        logprobs[start:stop] = call.logprobs
        advantages[span.rows] = value
        temperature[start:stop] = call.temperature or 1.0
        sampled[span.rows] = True
        spans.append(span)
    inputs = {
        "target_tokens": as_tensor(np.asarray(ids[1:], dtype=np.int64)),
        "logprobs": as_tensor(logprobs),
        "advantages": as_tensor(advantages),
    }
    if (temperature != 1).any():
        inputs["temperature"] = as_tensor(temperature)
    if loss_fn == "gspo":
        inputs["sequence_ratio_mask"] = as_tensor(sampled.astype(np.float32))
    return Datum(model_input=_model_input(ids[:-1], chain[-1].images), loss_fn_inputs=inputs), spans


def _model_input(ids: Sequence[int], images: Sequence[CallImage]) -> ModelInput:
    return ModelInput(
        chunks=[
            EncodedTextChunk(tokens=run)
            if isinstance(run, list)
            else ImageChunk(data=file_of(run), format=run["format"], expected_tokens=run["tokens"])
            for run in split_at_images(ids, images)
        ]
    )


def _usable(calls: list[Call], result: DatumSet, *, mask_truncated: bool) -> list[Call]:
    usable = []
    for call in calls:
        if not call.output_ids:
            result.drop(DropReason.EMPTY_OUTPUT, [call])
        elif not call.prompt_ids:
            result.drop(DropReason.EMPTY_PROMPT, [call])
        elif not all(math.isfinite(logprob) for logprob in call.logprobs):
            result.drop(DropReason.NON_FINITE_LOGPROBS, [call])
        elif len(call.forced) == len(call.output_ids):
            result.drop(DropReason.NOTHING_CHOSEN, [call])
        elif mask_truncated and call.stop_reason == "length":
            result.drop(DropReason.TRUNCATED, [call])
        else:
            usable.append(call)
    return usable


def as_tensor(array: np.ndarray[Any, Any]) -> TensorData:
    """An input of a Datum: float32 unless it has ids."""
    return TensorData(data=array, dtype="int64" if array.dtype == np.int64 else "float32", shape=list(array.shape))
