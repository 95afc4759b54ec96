"""Shared models, and the book in which each proof writes the worst deviation that it saw."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from plain_reference import PlainModel
from tiny import save_family

from nat_plugin_evsys.engine.model.loading import BaseModel, load_base_model

RECORD_VARIABLE = "EVSYS_CORRECTNESS_RECORD"
"""Names the JSON-lines file that ``measured`` appends to; scripts/correctness_report.py sets it."""


@pytest.fixture(scope="session")
def measured() -> Callable[..., None]:
    """``measured(proof, compared, subject, worst=…, bound=…, **cases)``: keep a figure for the docs, and check it.

    Args:
        proof: number and name of the proof, as the issue lists them: ``"1 losses"``.
        compared: what with what.
        subject: for which model family, loss, … of several.
        worst: the largest deviation seen; for a proof of equality the number of things that differed.
        bound: what ``worst`` must not exceed.
        cases: how many comparisons, by unit: ``tokens=412``.
    """

    def measure(proof: str, compared: str, subject: str = "", *, worst: float, bound: float, **cases: int) -> None:
        target = os.environ.get(RECORD_VARIABLE)
        if target:
            row = {"proof": proof, "compared": compared, "subject": subject, "worst": worst, "bound": bound}
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "cases": cases}) + "\n")
        assert worst <= bound, f"{compared} {subject}: worst deviation {worst:g}, bound {bound:g}"

    return measure


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``model_dir(family)``: the family's model directory."""
    root = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        path = root / family
        return path if path.exists() else save_family(family, path)

    return make


def _cached(make: Callable[[str], Any]) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            made[family] = make(family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def base_of(model_dir: Callable[[str], Path]) -> Callable[[str], BaseModel]:
    """``base_of(family)``: the family's base model as the engine loads it; frozen, so shared by all tests."""
    return _cached(lambda family: load_base_model(str(model_dir(family)), device="cpu", dtype="float32"))


@pytest.fixture(scope="session")
def plain_of(model_dir: Callable[[str], Path]) -> Callable[[str], PlainModel]:
    """``plain_of(family)``: the same weights without the engine, in float64."""
    return _cached(lambda family: PlainModel(model_dir(family)))
