"""The Berkeley Function Calling Leaderboard's questions and its own checker, where the package is installed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


def rows(category: str) -> list[dict[str, Any]]:
    """Questions with their ``ground_truth``; what a function requires may not be omitted, whatever the answer says."""
    data = Path(pytest.importorskip("bfcl_eval").__file__).parent / "data"
    questions, answers = (_lines(folder / f"BFCL_v4_{category}.json") for folder in (data, data / "possible_answer"))
    truths = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [{**question, "ground_truth": _with_required(question, truths[question["id"]])} for question in questions]


def _with_required(question: dict[str, Any], truth: list[dict[str, Any]]) -> list[dict[str, Any]]:
    required = {function["name"]: function["parameters"].get("required", []) for function in question["function"]}
    return [
        {
            name: {
                key: [value for value in values if value != "" or key not in required[name]]
                for key, values in arguments.items()
            }
            for name, arguments in call.items()
        }
        for call in truth
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


class Checker:
    """The leaderboard's AST checker. The clients of thirty model vendors that its package imports are left out: the
    checker reads one flag of theirs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("bfcl_eval")
        models = ModuleType("bfcl_eval.constants.model_config")
        models.MODEL_CONFIG_MAPPING = {"any": SimpleNamespace(underscore_to_dot=False)}  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, models.__name__, models)
        self._check = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        self._python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON

    def accepts(self, row: dict[str, Any], calls: list[dict[str, Any]]) -> bool:
        """Whether ``calls``, each ``{name: arguments}``, answer the row."""
        category = row["id"].rpartition("_")[0]
        verdict = self._check(row["function"], calls, row["ground_truth"], self._python, category, "any")
        return bool(verdict["valid"])
