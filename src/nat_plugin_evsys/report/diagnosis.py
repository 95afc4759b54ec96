"""Finds what is wrong with a run: facts of an epoch in, findings out. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nat_plugin_evsys.report.findings import Finding, FindingId, quoted
from nat_plugin_evsys.report.one_answer import one_answer
from nat_plugin_evsys.report.replies import EQUAL_WITHIN, Reply, ReplyNumbers, examples
from nat_plugin_evsys.report.several_answers import naming_several

NAMING_SEVERAL_WINS = (
    "Naming several answers wins the reward: make the evaluator refuse that (evsys_exact_match has `mode: one_of` with "
    "`choices`, and `mode: exact`)."
)

CUT_SHARE = 0.2
"""Share of the calls that must have ended at the token limit before it is worth a word."""

SEVERAL_SHARE = 0.1
"""Share of the rewarded replies, and at least two of them, that must name several answers before it is worth a word."""

MOST_HELDOUT = 0.5
"""The same share of the rewarded replies to held-out rows; with it their reward says little about the task."""

FALLEN_TO = 0.25
"""Share of the best gain over the first epoch; a mean reward that keeps less of it has been lost again."""

GAIN_WORTH_KEEPING = 0.1
"""A smaller gain, as a share of the rewards' range, is none: the policy was good from the start, or never."""

LOST_HALF = 0.5
"""Share of its reward above the lowest one that such a policy must lose before it is a loss."""

BEYOND_LUCK = 3.0
"""Standard errors of the difference between two mean rewards by which one must be lower before it has fallen."""

SIGNAL_OF_A_COLLAPSE = 0.25
"""One answer to all rows is a collapse where less than this share of the rows has a signal: no way leads back."""

SHRUNK_TO = 0.2
"""A reply that is shorter than this share of those of the first epoch has shrunk."""

ENTROPY_FLOOR = 0.1
"""Share of the first epoch's entropy below which a policy hardly tries alternatives."""

MOVED_FAR = 1.0
"""KL in nats a token by which an epoch may move the policy before it is another one."""

MOVED_WELL = 0.1
"""What ``target_kl`` aims at by default."""

SOLVED = 0.9
"""Share of the rewards' range that a mean reward must have reached before a policy has nothing left to try."""

EMPTY_SHARE = 0.5
"""Share of the replies without a word that is worth one."""


@dataclass(frozen=True, slots=True)
class EpochFacts:
    """The facts about an epoch that has ended.

    Attributes:
        epoch: counted from 1.
        replies: of the training rollouts.
        trained: calls that were trained on.
        heldout: replies of the validation after the epoch; empty if there was none.
        before: the numbers of the epochs before, oldest first.
        reloaded_after: how many of ``before`` ended when an earlier checkpoint was last reloaded; 0 if none was. The
            epochs since are compared with one another alone.
        can_reload: whether ``on_collapse`` has been set, so that there is no need to advise it.
        last_trained: the last epoch before this one that trained anything; 0 for none.
        entropies: mean entropy of the trained tokens in nats, of each epoch that has one, this one last.
        metrics: of the epoch's training job; empty if it had none.
        epochs_per_pass: epochs that visit every row once. Rewards are compared between windows of that many epochs,
            since single ones have other rows.
    """

    epoch: int
    replies: Sequence[Reply]
    trained: int
    heldout: Sequence[Reply] = ()
    before: Sequence[ReplyNumbers] = ()
    reloaded_after: int = 0
    can_reload: bool = False
    last_trained: int = 0
    entropies: Sequence[float] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    epochs_per_pass: int = 1

    @property
    def numbers(self) -> ReplyNumbers:
        """The training rollouts in numbers."""
        return ReplyNumbers.of(self.replies)


class _Mean(NamedTuple):
    """Mean reward over epochs that together visit every row, and the variance of that mean."""

    reward: float
    variance: float


def _reward_means(facts: EpochFacts, numbers: ReplyNumbers) -> list[_Mean]:
    """Those since the last reload, oldest first; the last one ends with this epoch. None where it has no reward."""
    if numbers.reward_mean is None:
        return []
    epochs = [*facts.before[facts.reloaded_after :], numbers]
    means = [_Mean(m, each.reward_std**2 / each.replies) for each in epochs if (m := each.reward_mean) is not None]
    width = facts.epochs_per_pass
    windows = [means[end - width : end] for end in range(width, len(means) + 1)]
    return [_Mean(sum(m.reward for m in each) / width, sum(m.variance for m in each) / width**2) for each in windows]


def _start_again(facts: EpochFacts) -> str:
    reload = "" if facts.can_reload else ", or set `on_collapse: reload_best` on the trainer"
    return f"Start again with a lower `learning_rate`{reload}"


def diagnose(facts: EpochFacts) -> list[Finding]:
    """Everything that is wrong with the epoch, most important first."""
    checks: tuple[Callable[[EpochFacts, ReplyNumbers], Finding | None], ...] = (
        _same_reward,
        _one_answer,
        _heldout_several,
        _several_answers,
        _no_signal,
        _fallen,
        _shrunk,
        _moved_far,
        _low_entropy,
        _cut_off,
    )
    numbers = facts.numbers
    return [finding for check in checks if (finding := check(facts, numbers)) is not None]


def _same_reward(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    low, high = _range(facts, numbers)
    if numbers.replies < 2 or high - low > EQUAL_WITHIN:
        return None
    outcome = "no reply is better than another" + ("" if facts.trained else " and nothing was trained")
    return Finding(
        FindingId.SAME_REWARD,
        facts.epoch,
        f"Every reward of epoch {facts.epoch} is {low:.3f} ({numbers.replies} replies to {numbers.rows} rows), so "
        f"{outcome}.",
        "Compare the replies with what the evaluator wants: it may give every reply the same score, or the task may be "
        "solved. Where it is too hard, a prompt that states the form of the answer, an evaluator that rewards a part "
        "of it, or a `warm_start` on demonstrations gives the policy a difference to learn from.",
        examples(facts.replies),
    )


def _no_signal(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    low, high = _range(facts, numbers)
    if facts.trained or numbers.rows_with_signal or numbers.reward_mean is None or high - low <= EQUAL_WITHIN:
        return None
    if facts.epoch - facts.last_trained < facts.epochs_per_pass:
        return None  # other rows may have one
    is_best = numbers.reward_min == high
    lost = f"every group has lost its signal after epoch {facts.last_trained}" if facts.last_trained else "no signal"
    return Finding(
        FindingId.NO_SIGNAL,
        facts.epoch,
        f"Epoch {facts.epoch} trained nothing: {lost}, since all attempts at a row get the same reward "
        f"(mean {numbers.reward_mean:.3f}). {_variety(facts.replies)}",
        _advice_on_no_signal(facts, is_best=is_best),
        examples(facts.replies),
        collapse=bool(facts.last_trained) and _has_been_better(facts, numbers, beyond_luck=True),
    )


def _advice_on_no_signal(facts: EpochFacts, *, is_best: bool) -> str:
    if is_best:
        return "Every reply has the highest reward of this run, so more epochs on these rows change nothing."
    if not facts.last_trained:
        return "Raise `num_generations` or the policy's `temperature`, so that the attempts at a row differ."
    return f"{_start_again(facts)}, or serve the best checkpoint (`checkpoint: best`)."


def _fallen(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    means = _reward_means(facts, numbers)
    low, high = _range(facts, numbers)
    if len(means) < 2:
        return None
    first, now, best = means[0].reward, means[-1], max(means, key=lambda mean: mean.reward)
    gain, lost = best.reward - first, best.reward - now.reward
    if gain < GAIN_WORTH_KEEPING * (high - low):
        keeps_enough = lost < LOST_HALF * (best.reward - low)
    else:
        keeps_enough = now.reward - first >= FALLEN_TO * gain
    if keeps_enough or not _is_beyond_luck(best, now):
        return None
    best_epoch = facts.epoch + 1 - len(means) + means.index(best)
    width = facts.epochs_per_pass
    over = "" if width == 1 else f" (each the mean of {width} epochs, which visit every row)"
    return Finding(
        FindingId.FALLEN,
        facts.epoch,
        f"The reward has fallen from {best.reward:.3f} in epoch {best_epoch} to {now.reward:.3f} in epoch {facts.epoch}"
        f"{over}: what was learned is lost.",
        f"{_start_again(facts)}, or serve the best checkpoint (`checkpoint: best`).",
        examples(facts.replies),
        collapse=True,
    )


def _has_been_better(facts: EpochFacts, numbers: ReplyNumbers, *, beyond_luck: bool) -> bool:
    """Whether earlier epochs since the last reload had a higher mean reward."""
    means = _reward_means(facts, numbers)
    return any(_is_beyond_luck(mean, means[-1]) if beyond_luck else mean.reward > means[-1].reward for mean in means)


def _is_beyond_luck(higher: _Mean, lower: _Mean) -> bool:
    return higher.reward - lower.reward > BEYOND_LUCK * math.sqrt(higher.variance + lower.variance)


def _one_answer(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    low, high = _range(facts, numbers)
    for where, replies in ((f"of epoch {facts.epoch}", facts.replies), ("to held-out rows", facts.heldout)):
        found = one_answer(replies)
        if found is None:
            continue
        text, same = found
        earned = sum(reply.reward or 0.0 for reply in same) / len(same)
        wins = high > low and earned - low >= (high - low) / 2
        if replies is facts.heldout and not wins:
            continue  # a greedy policy that is still unsure may well begin with one answer
        rows = len({reply.row for reply in same})
        return Finding(
            FindingId.ONE_ANSWER,
            facts.epoch,
            f"{len(same)} of {len(replies)} replies {where} give the same answer to {rows} different rows: "
            f"{quoted(text)}. It earns {earned:.3f} on average.",
            _advice_on_one_answer(wins, facts),
            examples(same),
            collapse=not wins
            and facts.epoch > 1
            and numbers.rows_with_signal < SIGNAL_OF_A_COLLAPSE * numbers.rows
            and _has_been_better(facts, numbers, beyond_luck=False),
        )
    return None


def _several_answers(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    low, high = _range(facts, numbers)
    rewarded = _rewarded(facts.replies, low, high)
    several = naming_several(rewarded)
    if len(several) < max(2, SEVERAL_SHARE * len(rewarded)) or one_answer(facts.replies) is not None:
        return None
    return Finding(
        FindingId.SEVERAL_ANSWERS,
        facts.epoch,
        f"{len(several)} of {len(rewarded)} rewarded replies of epoch {facts.epoch} also name an answer that another "
        "row wants.",
        NAMING_SEVERAL_WINS,
        examples(several),
    )


def _heldout_several(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    low, high = _range(facts, numbers)
    rewarded = _rewarded(facts.heldout, low, high)
    several = [reply for reply in naming_several(facts.heldout) if reply in rewarded]
    if len(several) < max(2, MOST_HELDOUT * len(rewarded)) or one_answer(facts.heldout) is not None:
        return None
    reward = ReplyNumbers.of(facts.heldout).reward_mean
    return Finding(
        FindingId.HELDOUT_SEVERAL,
        facts.epoch,
        f"{len(several)} of {len(rewarded)} rewarded replies to held-out rows after epoch {facts.epoch} also name an "
        f"answer that another row wants, so a held-out reward of {reward:.3f} does not show that the policy chooses.",
        NAMING_SEVERAL_WINS,
        examples(several),
    )


def _rewarded(replies: Sequence[Reply], low: float, high: float) -> list[Reply]:
    """The replies in the upper half of the rewards' range."""
    return [reply for reply in replies if reply.reward is not None and reply.reward - low > (high - low) / 2]


def _advice_on_one_answer(wins: bool, facts: EpochFacts) -> str:
    if wins:
        return (
            "The reward can be won without reading the row: make the evaluator refuse an answer that fits every row "
            "(evsys_exact_match has `mode: exact`)."
        )
    if facts.epoch == 1:
        return "The untrained policy does not read the row: look at the prompt, or start with a `warm_start`."
    return f"The policy has collapsed. {_start_again(facts)}."


def _shrunk(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    first = facts.before[0] if facts.before else None
    if first is None or numbers.reward_mean is None or first.reward_mean is None or not numbers.replies:
        return None
    silent = numbers.empty >= EMPTY_SHARE * numbers.replies and numbers.empty > first.empty
    short = numbers.tokens_mean <= SHRUNK_TO * first.tokens_mean
    if numbers.reward_mean <= first.reward_mean or not (silent or short):
        return None
    empty = f", {numbers.empty} of {numbers.replies} say nothing at all" if numbers.empty else ""
    return Finding(
        FindingId.SHRUNK,
        facts.epoch,
        f"The reward rose from {first.reward_mean:.3f} to {numbers.reward_mean:.3f} between epoch 1 and {facts.epoch} "
        f"while the replies shrank from {first.tokens_mean:.0f} to {numbers.tokens_mean:.0f} tokens{empty}.",
        "Check that they still say what you want: the evaluator may reward short or empty replies.",
        examples(sorted(facts.replies, key=lambda reply: (-(reply.reward or 0.0), reply.tokens))),
    )


def _moved_far(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    moved = facts.metrics.get("kl_moved", 0.0)
    if moved <= MOVED_FAR:
        return None
    rate, factor = facts.metrics["learning_rate"], facts.metrics["lr_factor"]
    lower = rate * math.sqrt(MOVED_WELL / moved)
    return Finding(
        FindingId.MOVED_FAR,
        facts.epoch,
        f"Training on epoch {facts.epoch} moved the policy by {moved:.2f} nats a token from the one that sampled, at a "
        f"learning rate of {rate:.3g}. The rates of the next steps are multiplied by {factor:.3g} (`lr_factor`).",
        f"Lower `learning_rate`: the KL grows with its square, so {lower:.1g} would have moved it by {MOVED_WELL}.",
    )


def _low_entropy(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    low, high = _range(facts, numbers)
    if len(facts.entropies) < 2 or numbers.reward_mean is None:
        return None
    first, last = facts.entropies[0], facts.entropies[-1]
    if last >= ENTROPY_FLOOR * first or numbers.reward_mean - low >= SOLVED * (high - low):
        return None
    return Finding(
        FindingId.LOW_ENTROPY,
        facts.epoch,
        f"The policy hardly tries alternatives any more: the entropy of its tokens has fallen from {first:.3f} to "
        f"{last:.3f} nats while the mean reward is {numbers.reward_mean:.3f} (the best reply got {high:.3f}).",
        "Lower `learning_rate`, raise the policy's `temperature`, or set `kl_beta`, which pulls it to the base model.",
        examples(facts.replies),
    )


def _cut_off(facts: EpochFacts, numbers: ReplyNumbers) -> Finding | None:
    if not numbers.calls or numbers.cut < CUT_SHARE * numbers.calls:
        return None
    share = 100 * numbers.cut // numbers.calls  # 255 of 256 are not 100 %
    return Finding(
        FindingId.CUT_OFF,
        facts.epoch,
        f"{numbers.cut} of {numbers.calls} calls of epoch {facts.epoch} ({share} %) ended at `max_tokens`, in the "
        "middle of a reply.",
        "Raise the policy's `max_tokens`, or ask for shorter replies in the prompt.",
        examples([reply for reply in facts.replies if reply.cut]),
    )


def _range(facts: EpochFacts, numbers: ReplyNumbers) -> tuple[float, float]:
    """The lowest and the highest reward of the run so far."""
    seen = [*facts.before, numbers]
    lows = [each.reward_min for each in seen if each.reward_min is not None]
    highs = [each.reward_max for each in seen if each.reward_max is not None]
    return min(lows, default=0.0), max(highs, default=0.0)


def _variety(replies: Sequence[Reply]) -> str:
    found = one_answer(replies)
    if found is not None:
        return f"The policy gives one answer to every row: {quoted(found[0])}."
    texts = {(reply.row, reply.text) for reply in replies}
    if len(texts) == len({reply.row for reply in replies}):
        return "The policy gives each row one answer."
    return "The replies still differ, but not their rewards."
