"""``rollouts/`` of a run directory: one gzipped JSON-lines file for each collection of rollouts.

    rollouts/epoch-0003.jsonl.gz     the training rollouts of epoch 3
    rollouts/heldout-0003.jsonl.gz   the held-out rows, attempted by the policy after 3 epochs
    rollouts/train-0000.jsonl.gz     the training rows, attempted before the first epoch and after the last
    rollouts/base-0000.jsonl.gz      the held-out rows, attempted by the base model before a warm start
    rollouts/images/                 the images of all of them (runs/rollout_images.py)

Every line is one rollout in ATIF, NAT's interchange format of trajectories (``nat.atif.Trajectory``); its ``extra``
holds the fields of ``RolloutFacts``. ``zcat`` reads them, and so does every ATIF reader.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from nat_plugin_evsys.errors import DataError
from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import escape_line_ends
from nat_plugin_evsys.runs.rollout_images import RolloutImages

CollectionKind = Literal["train", "heldout", "epoch", "base"]

_COMPRESSION = 6
_NAME = re.compile(rf"({'|'.join(get_args(CollectionKind))})-(\d+)\.jsonl\.gz")


class Collection(NamedTuple):
    """A collection of rollouts: ``epoch`` 3 is counted from 1, ``heldout`` and ``train`` 3 come after 3 epochs.

    ``base`` 0, the held-out rows before a warm start, is the only one of its kind.
    """

    kind: CollectionKind
    epoch: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.epoch:04d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutFacts:
    """What is known of a rollout beyond its messages: ``extra`` of its ATIF trajectory.

    Attributes:
        collection, epoch: see ``Collection``.
        row_id: id of the dataset row; ``question`` and ``expected`` are its input and answer, ``entry`` is all of it.
        attempt: which of the attempts at its row it is, from 0.
        output: what the workflow returned.
        reward: the evaluator's score, or None; ``reasoning`` is what the evaluator said.
        error: what the workflow raised or what went wrong, or None.
        dropped: why it was not trained on, or None when it was.
        advantage: of its trained calls; None where none was computed.
        policy_versions: the policy versions that sampled it, ascending.
        seconds: how long the workflow ran.
    """

    collection: CollectionKind
    epoch: int
    row_id: str
    attempt: int
    question: Any = None
    expected: Any = None
    entry: Any = None
    output: Any = None
    reward: float | None = None
    reasoning: Any = None
    error: str | None = None
    dropped: str | None = None
    advantage: float | None = None
    policy_versions: tuple[int, ...] = ()
    seconds: float | None = None

    @classmethod
    def of(cls, extra: Mapping[str, Any] | None) -> Self:
        """The facts in a trajectory's ``extra``; fields of other versions are ignored.

        Raises:
            DataError: the trajectory was not written by a run of this package.
        """
        known = {item.name for item in fields(cls)}
        try:
            return cls(**{name: value for name, value in (extra or {}).items() if name in known})
        except TypeError as error:
            raise DataError(f"not a run's rollout: {error}") from error


class RolloutFiles:
    """The rollouts of one run. A file is whole or absent."""

    def __init__(self, run_dir: Path) -> None:
        self.directory = run_dir / "rollouts"
        self.images = RolloutImages(self.directory)

    def path(self, collection: Collection) -> Path:
        """The path of a collection, whether it exists or not."""
        return self.directory / f"{collection}.jsonl.gz"

    def collections(self) -> list[Collection]:
        """The collections on disk, in the order in which a run makes them."""
        names = (_NAME.fullmatch(path.name) for path in self.directory.glob("*.jsonl.gz"))
        found = [Collection(name[1], int(name[2])) for name in names if name]  # type: ignore[arg-type]
        return sorted(found, key=lambda item: (item.epoch, ("base", "epoch", "heldout", "train").index(item.kind)))

    def write(self, collection: Collection, lines: Iterable[str]) -> int:
        """Replace a collection.

        Args:
            lines: one JSON object each.

        Returns:
            Bytes on disk.
        """
        self.directory.mkdir(exist_ok=True)
        text = escape_line_ends("".join(line + "\n" for line in lines))
        data = gzip.compress(text.encode("utf-8"), _COMPRESSION, mtime=0)
        atomic_write(self.path(collection), data)
        return len(data)

    def lines(self, collection: Collection) -> Iterator[str]:
        """The lines of a collection; none if it was not kept.

        Raises:
            DataError: the file cannot be read.
        """
        path = self.path(collection)
        if not path.is_file():
            return
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                yield from (line for line in file if line.strip())
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}; delete it to continue without these rollouts") from error

    def discard_after(self, epoch: int) -> None:
        """Delete leftovers of an unfinished epoch, so that a resumed run keeps each rollout once."""
        for collection in self.collections():
            if collection.epoch > epoch:
                self.path(collection).unlink()
