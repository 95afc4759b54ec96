"""Part 1: on this device the numbers are right, for three model families with random weights."""

from __future__ import annotations

import exact_gradients
import exact_resume
import exact_sampling
from findings import Findings
from place import FAMILIES, Place


def run(findings: Findings, place: Place) -> None:
    """Every comparison of every family; one that breaks does not keep the others from being made."""
    for family in FAMILIES:
        for subject in (exact_gradients, exact_sampling, exact_resume):
            with findings.attempt(f"{family} {subject.__name__}"):
                subject.check(findings, place, family)
