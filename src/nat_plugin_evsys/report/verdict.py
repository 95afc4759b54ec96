"""Did it get better? The rewards before and after, the uncertainty of the change, and the answer in a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from nat_plugin_evsys.report.findings import FindingId
from nat_plugin_evsys.report.intervals import Interval, change_interval, mean_interval
from nat_plugin_evsys.report.metrics_log import BASE, EPOCH, VALIDATION
from nat_plugin_evsys.runs.rollouts import Collection, CollectionKind
from nat_plugin_evsys.runs.state import RunState

Row = Mapping[str, Any]
RowRewards = Mapping[str, float]
"""Reward of each dataset row."""

Answer = Literal["yes", "no", "unclear", "unmeasured"]

_OPENINGS: dict[str, str] = {"yes": "Yes.", "no": "No, it got worse.", "unclear": "Not clearly."}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a run.

    Attributes:
        answer: ``yes`` or ``no`` if the interval of the change excludes 0, else ``unclear``.
            After a warm start, ``no`` if the epochs since then have clearly lowered the reward, and never ``yes`` if
            they ended no higher.
        sentence: the answer in words.
        kind: the rows it is about: the held-out rows, or the training rows if there are none.
        before, after: mean rewards, of the base model and of what it became; None where nothing was measured.
        change: of the same rows; None if their rewards were not kept.
        rows: how many got ``better``, ``worse`` or stayed the ``same``.
        warm_start: mean reward on the held-out rows after a warm start; None without one.
        since_warm_start: change of the same rows since then; None without one.
    """

    answer: Answer
    sentence: str
    kind: CollectionKind
    before: Interval | None
    after: Interval | None
    change: Interval | None
    rows: dict[str, int]
    warm_start: Interval | None = None
    since_warm_start: Interval | None = None


def verdict(state: RunState, collections: Sequence[Collection], rewards: Callable[[Collection], RowRewards]) -> Verdict:
    """Whether a run made the policy better.

    Args:
        collections: the kept ones, as ``delivered`` has them.
        rewards: the rewards of one of them by row.
    """
    kind: CollectionKind = "train" if state.heldout_reward_before is None else "heldout"
    kept = [collection for collection in collections if collection.kind == kind]
    base = [collection for collection in collections if collection.kind == "base" and kind == "heldout"]
    measured = [*base, *kept]
    old, new = (rewards(measured[0]), rewards(measured[-1])) if len(measured) > 1 else ({}, {})
    rows = [row for row in old if row in new]
    before = mean_interval(list(old.values())) or _mean_alone(_reward(state, kind, "before"))
    after = mean_interval(list(new.values())) or _mean_alone(_reward(state, kind, "after"))
    change = change_interval([old[row] for row in rows], [new[row] for row in rows])
    counts = {
        "better": sum(new[row] > old[row] for row in rows),
        "worse": sum(new[row] < old[row] for row in rows),
        "same": sum(new[row] == old[row] for row in rows),
    }
    answer = _answer(before, after, change)
    found = Verdict(answer, _sentence(answer, kind, before, after, change), kind, before, after, change, counts)
    return _told_apart(found, [rewards(collection) for collection in kept]) if base and kept else found


def delivered(collections: Sequence[Collection], reloads: Mapping[int, int]) -> list[Collection]:
    """``collections``, but in place of the held-out rows as a policy answered them that was then given up for an
    earlier checkpoint, those rows as this one had answered them, if they were kept.

    Args:
        reloads: see ``metrics_log.reloads``.
    """
    found = []
    for each in collections:
        earlier = Collection("heldout", reloads.get(each.epoch, each.epoch))
        found.append(earlier if each.kind == "heldout" and earlier in collections else each)
    return found


def _told_apart(found: Verdict, measured: Sequence[RowRewards]) -> Verdict:
    """``found``, with what the epochs since a warm start did told apart from the warm start itself.

    Args:
        measured: the rewards of each measurement since the warm start, which the first one follows at once.
    """
    taught, new = measured[0], measured[-1]
    warm_start = mean_interval(list(taught.values()))
    rows = [row for row in taught if row in new]
    since = change_interval([taught[row] for row in rows], [new[row] for row in rows])
    if warm_start is None or since is None:
        return found
    if len(measured) == 1:
        return replace(
            found, sentence=f"{found.sentence} So far only the warm start was measured.", warm_start=warm_start
        )
    is_clear = not since.low <= 0.0 <= since.high
    answer, sentence = found.answer, found.sentence
    fell = is_clear and since.mean < 0.0
    if fell or (answer == "yes" and since.mean <= 0.0):
        opening = "Not by what came after the warm start." if fell else "Only by the warm start."
        sentence = f"{opening} {sentence.removeprefix(_OPENINGS.get(answer, '')).lstrip()}"
        answer = "no" if fell else "unclear"
    no_change = "" if is_clear else ", which includes no change"
    sentence += f" The epochs since the warm start changed it by {_signed(since.mean)} "
    sentence += f"(95% interval {_signed(since.low)} to {_signed(since.high)}{no_change})."
    lowered = ", and training since then has lowered it" if fell else ""
    sentence += f" After the warm start alone it was {warm_start.mean:.3f}{lowered}."
    return replace(found, answer=answer, sentence=sentence, warm_start=warm_start, since_warm_start=since)


def doubted(found: Verdict, findings: Iterable[FindingId]) -> Verdict:
    """``found``, but no plain "Yes" if ``findings`` of the last epoch say that the reward is won without the task."""
    if found.answer != "yes" or not {FindingId.ONE_ANSWER, FindingId.HELDOUT_SEVERAL} & set(findings):
        return found
    opening = "The reward rose, but it is won without solving the task: see the warning."
    return replace(
        found, answer="unclear", sentence=f"{opening} {found.sentence.removeprefix(_OPENINGS['yes']).lstrip()}"
    )


def curve(
    rows: Iterable[Row], collections: Sequence[Collection], rewards: Callable[[Collection], RowRewards]
) -> dict[str, list[dict[str, Any]]]:
    """The points of the reward curve, by the number of epochs behind the policy that earned them.

    Returns:
        ``training``: mean, and low and high (one standard deviation, but not beyond what was seen); ``heldout``: mean,
        and low and high of its interval where the rows' rewards were kept; ``base``: the same of the base model, where
        a warm start came before the first of ``heldout``.
    """
    training: list[dict[str, Any]] = []
    heldout: list[dict[str, Any]] = []
    base: list[dict[str, Any]] = []
    for row in rows:
        if row["event"] == EPOCH and row.get("reward_mean") is not None:
            mean, spread = row["reward_mean"], row.get("reward_std") or 0.0
            low, high = max(mean - spread, row["reward_min"]), min(mean + spread, row["reward_max"])
            training.append({"epochs": row["epoch"] - 1, "mean": mean, "low": low, "high": high})
        elif row["event"] in (BASE, VALIDATION) and row.get("reward") is not None:
            points = base if row["event"] == BASE else heldout
            collection = Collection("base" if row["event"] == BASE else "heldout", row["epoch"])
            interval = mean_interval(list(rewards(collection).values())) if collection in collections else None
            interval = interval or Interval(row["reward"], row["reward"], row["reward"], row["num_examples"])
            point = {"epochs": row["epoch"], "mean": row["reward"], "low": interval.low, "high": interval.high}
            points.append({**point, "count": interval.count})
    return {"training": training, "heldout": heldout, "base": base}


def comparison(kinds: tuple[CollectionKind, CollectionKind], rewards: tuple[RowRewards, RowRewards]) -> str:
    """Which of two runs, A and B, came out better, in a sentence.

    Args:
        kinds: the rows that each was last measured on; ``rewards``: its rewards there, by row.
    """
    rows = [row for row in rewards[0] if row in rewards[1]]
    difference = change_interval([rewards[0][row] for row in rows], [rewards[1][row] for row in rows])
    if kinds[0] != kinds[1] or difference is None:
        return "The two runs were not measured on the same rows, so only their means can be compared."
    on = f"on the same {len(rows)} {_rows_called(kinds[0])}"
    if difference.low <= 0.0 <= difference.high:
        sure = _sure(difference.low, difference.high)
        return f"No clear difference: {on} B earned {_signed(difference.mean)} relative to A {sure}."
    if difference.mean > 0:
        better, worse, sure = "B", "A", _sure(difference.low, difference.high)
    else:
        better, worse, sure = "A", "B", _sure(-difference.high, -difference.low)
    return f"{better} is better: {on} it earned {abs(difference.mean):.3f} more than {worse} {sure}."


def _sure(low: float, high: float) -> str:
    return f"(95% interval {_signed(low)} to {_signed(high)})"


def _answer(before: Interval | None, after: Interval | None, change: Interval | None) -> Answer:
    if before is None or after is None:
        return "unmeasured"
    if change is None or change.low <= 0.0 <= change.high:
        return "unclear"
    return "yes" if change.low > 0 else "no"


def _sentence(
    answer: Answer, kind: CollectionKind, before: Interval | None, after: Interval | None, change: Interval | None
) -> str:
    what = _rows_called(kind)
    if before is None or after is None:
        return (
            "Not measured yet: a reward before and after training is needed. Set validation_dataset to rows that "
            "are not trained on."
        )
    moved = f"from {before.mean:.3f} to {after.mean:.3f}"
    if change is None:
        return (
            f"The mean reward on the {what} went {moved}; the single rewards were not kept, so its uncertainty is open."
        )
    on = f"On {change.count} {what}"
    sure = f"({_signed(change.mean)}; 95% interval {_signed(change.low)} to {_signed(change.high)})"
    caution = (
        "" if kind == "heldout" else " These are the rows it was trained on: set validation_dataset for a fair test."
    )
    went = {"yes": "rose", "no": "fell"}.get(answer, "went")
    unsure = "" if answer in ("yes", "no") else ", which includes no change"
    return f"{_OPENINGS[answer]} {on} the mean reward {went} {moved} {sure}{unsure}.{caution}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _rows_called(kind: CollectionKind) -> str:
    return "held-out rows" if kind == "heldout" else "training rows"


def _reward(state: RunState, kind: CollectionKind, when: Literal["before", "after"]) -> float | None:
    if kind == "heldout":
        if when == "before" and state.heldout_reward_base is not None:
            return state.heldout_reward_base
        return state.heldout_reward_before if when == "before" else state.heldout_reward_after
    return state.train_reward_before if when == "before" else state.train_reward_after


def _mean_alone(mean: float | None) -> Interval | None:
    return None if mean is None else Interval(mean, mean, mean, 0)
