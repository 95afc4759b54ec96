"""Keeps the rollouts: writes every collection of a run to its file once its outcome is known."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from nat_plugin_evsys.calls import CallFate, CallKey, DropReason
from nat_plugin_evsys.json_lines import jsonable
from nat_plugin_evsys.rollouts.attempts import Attempt
from nat_plugin_evsys.runs.rollouts import Collection, RolloutFacts, RolloutFiles

if TYPE_CHECKING:
    from nat_plugin_evsys.rollouts.atif import TokenTexts

logger = logging.getLogger(__name__)


class RolloutKeeper:
    """Writes collections of attempts in ATIF.

    Args:
        token_bytes: the UTF-8 bytes that a token stands for, of the policy's tokenizer.
        rows: how many rows of a collection to keep, the first in the dataset's order; None keeps all. Held-out rows are
            all kept.
        session, agent, model: see ``atif_trajectory``.
    """

    def __init__(
        self,
        files: RolloutFiles,
        token_bytes: Callable[[int], bytes],
        *,
        rows: int | None,
        session: str,
        agent: str,
        model: str,
    ) -> None:
        self._files = files
        self._texts = token_texts(token_bytes)
        self._rows = rows
        self._names = {"session": session, "agent": agent, "model": model}

    async def keep(
        self,
        collection: Collection,
        attempts: Sequence[Attempt],
        *,
        fates: Mapping[CallKey, CallFate] | None = None,
        held_back: Mapping[str, DropReason] | None = None,
    ) -> None:
        """``write`` in a thread."""
        await asyncio.to_thread(self.write, collection, attempts, fates or {}, held_back or {})

    def write(
        self,
        collection: Collection,
        attempts: Sequence[Attempt],
        fates: Mapping[CallKey, CallFate],
        held_back: Mapping[str, DropReason],
    ) -> None:
        """Write a collection. If the file cannot be written, that is logged and the run continues.

        Args:
            fates: what training did with the calls.
            held_back: rollout id -> why the rollout was held back from training.
        """
        kept = self._within_bound(collection, attempts)
        if not kept:
            return
        started = time.monotonic()
        lines = (self._line(collection, attempt, fates, held_back.get(attempt.run_id)) for attempt in kept)
        try:
            size = self._files.write(collection, lines)
        except OSError as error:
            logger.warning("rollouts of %s were not kept: %s", collection, error)
            return
        seconds = time.monotonic() - started
        logger.debug("rollouts of %s: %d kept, %d bytes, %.2f s", collection, len(kept), size, seconds)

    def _within_bound(self, collection: Collection, attempts: Sequence[Attempt]) -> list[Attempt]:
        """The attempts to keep, row by row."""
        rows: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            rows.setdefault(attempt.row_id, []).append(attempt)
        bound = None if collection.kind in ("heldout", "base") else self._rows
        return [attempt for row in list(rows.values())[:bound] for attempt in row]

    def _line(
        self,
        collection: Collection,
        attempt: Attempt,
        fates: Mapping[CallKey, CallFate],
        held_back: DropReason | None,
    ) -> str:
        from nat_plugin_evsys.rollouts.atif import atif_trajectory

        facts = rollout_facts(collection, attempt, fates, held_back)
        name = f"{collection}/{attempt.row_id}/{attempt.number}"
        made = atif_trajectory(attempt, fates, self._texts, name=name, extra=asdict(facts), **self._names)
        for call in attempt.calls:
            for image in call.images:
                self._files.images.keep(image)
        return self._files.images.keep_named(made.model_dump_json(exclude_none=True))


def rollout_facts(
    collection: Collection, attempt: Attempt, fates: Mapping[CallKey, CallFate], held_back: DropReason | None
) -> RolloutFacts:
    """What is kept of an attempt in addition to its messages."""
    own = [fates[call.key] for call in attempt.calls if call.key in fates]
    advantages = [fate.advantage for fate in own if fate.advantage is not None]
    return RolloutFacts(
        collection=collection.kind,
        epoch=collection.epoch,
        row_id=attempt.row_id,
        attempt=attempt.number,
        question=plain(attempt.question),
        expected=plain(attempt.expected),
        entry=plain(attempt.entry),
        output=plain(attempt.output),
        reward=attempt.reward,
        reasoning=plain(attempt.reasoning),
        error=attempt.error,
        dropped=_drop_reason(collection, attempt, own, held_back),
        advantage=advantages[0] if advantages else None,
        policy_versions=tuple(sorted({call.policy_version for call in attempt.calls})),
        seconds=None if attempt.seconds is None else round(attempt.seconds, 3),
    )


def _drop_reason(
    collection: Collection, attempt: Attempt, fates: Sequence[CallFate], held_back: DropReason | None
) -> DropReason | None:
    """Why none of the attempt's calls was trained on; None if one was."""
    if attempt.lost is not None:
        return attempt.lost
    if collection.kind != "epoch":
        return DropReason.VALIDATION
    if attempt.untrainable is not None:
        return attempt.untrainable
    if held_back is not None:
        return held_back
    reasons = [fate.dropped for fate in fates if fate.dropped is not None]
    if len(reasons) < len(fates):
        return None
    return reasons[0] if reasons else DropReason.NOT_REACHED


def token_texts(token_bytes: Callable[[int], bytes]) -> TokenTexts:
    """A function from token ids to the text of each.

    A character that several tokens make up is the text of the one that completes it, so the texts joined are the text
    of all.
    """
    known: dict[int, bytes] = {}
    whole: dict[int, str] = {}

    def learn(token_id: int) -> None:
        known[token_id] = token_bytes(token_id)
        with contextlib.suppress(UnicodeDecodeError):
            whole[token_id] = known[token_id].decode()

    def texts(ids: Sequence[int]) -> list[str]:
        for token_id in set(ids) - known.keys():
            learn(token_id)
        if whole.keys() >= set(ids):  # nearly always, and much faster
            return [whole[token_id] for token_id in ids]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(known[token_id]) for token_id in ids]
        return [*pieces[:-1], pieces[-1] + decoder.decode(b"", final=True)]

    return texts


def plain(value: Any) -> Any:
    """``value`` in JSON's types; anything else as text."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # an array, which a list of a .parquet file is read as
        return plain(value.tolist())
    try:
        return jsonable(value)
    except TypeError:
        return str(value)
