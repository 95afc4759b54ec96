"""One line for a part of the check: how it came out, and its figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import table
from findings import Record

OK, SLOW, FAILED, CUT, SKIPPED = "ok", "BELOW FLOOR", "FAILED", "CUT SHORT", "not run"

_MANY = 10
"""Comparisons of a part whose figures are left out of its line."""


@dataclass
class Result:
    """A part and what is known of it.

    Attributes:
        name: of the part.
        ended: how its process ended: "" if well, or what happened to it.
        seconds: that it took.
        findings: in the order of their coming.
    """

    name: str
    ended: str = ""
    seconds: float = 0.0
    findings: list[Record] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Record]:
        """The findings of one kind."""
        return [f for f in self.findings if f["kind"] == kind]

    @property
    def wrong(self) -> list[Record]:
        """Comparisons that are off by more than they may be."""
        return [f for f in self.of_kind("exact") if not f["value"] <= f["bound"]]

    @property
    def outcome(self) -> str:
        """What came out of it."""
        if self.wrong or self.of_kind("broken") or self.ended.startswith("ended"):
            return FAILED
        if self.ended:
            return CUT if self.seconds else SKIPPED
        return SLOW if any(_below(r) for r in self.of_kind("row")) else OK

    def line(self) -> str:
        """The verdict."""
        said = [self.ended] if self.ended else []
        said += [f"{f['name']} broke" for f in self.of_kind("broken")]
        exact = self.of_kind("exact")
        if exact:
            fail = f"{len(self.wrong)} of {len(exact)} comparisons fail"
            held = fail if self.wrong else f"{len(exact)} comparisons hold"
            worst = max(self.wrong or exact, key=_share_of_bound)
            said.append(f"{held}, the worst: {worst['name']} {worst['value']:.1e} of {worst['bound']:.0e}")
        said += [f"{r['name']} {r['ratio']:.2f}{_floor(r)}" for r in self.of_kind("row")]
        if not self.of_kind("row") and len(exact) < _MANY:
            said += [f"{f['name']} {f['value']:.2g}" for f in self.of_kind("figure")]
        return f"{self.name:12s} {self.outcome:11s} {self.seconds:4.0f} s  {'; '.join(said)}"

    def as_json(self) -> dict[str, Any]:
        """For ``gpu.json``."""
        return {**asdict(self), "outcome": self.outcome, "line": self.line()}


def exit_code(results: Sequence[Result], must_finish: Sequence[str]) -> int:
    """1 where a part failed, or one of those that must finish did not; slow is no failure."""
    unfinished = {r.name for r in results if r.outcome in (CUT, SKIPPED)}
    return int(any(r.outcome == FAILED for r in results) or bool(unfinished & {*must_finish}))


def _share_of_bound(comparison: Record) -> float:
    value, bound = comparison["value"], comparison["bound"]
    if bound and not math.isnan(value):
        return value / bound
    return 0.0 if value <= bound else math.inf


def _below(row: Record) -> bool:
    return table.verdict(row) == SLOW


def _floor(row: Record) -> str:
    return f" (floor {row['floor']:g})" if _below(row) else ""
