"""Writes training rows, held-out rows and demonstrations from the Berkeley Function Calling Leaderboard.

    python examples/function_calling/make_data.py [--small] [DIRECTORY]

The questions and their accepted answers come with the package ``bfcl-eval`` (Apache-2.0) and are not part of this
repository. The 400 rows of its category ``simple_python`` (one function, one call) are shuffled and split, the same way
every time: 100 are held out, 100 become demonstrations for the warm start, 200 are for reinforcement finetuning.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml
from langchain_core.utils.function_calling import convert_to_openai_tool
from nat_function_calling.rows import Row

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "function_calling.yml"
DIRECTORY = ROOT / ".evsys" / "function_calling-data"
CATEGORY = "simple_python"
SIZES = {"heldout": 100, "demonstrations": 100, "train": 200}
SMALL = {"heldout": 24, "demonstrations": 8, "train": 16}

TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""The leaderboard's names of types that JSON Schema has not, and JSON Schema's."""

Json = dict[str, Any]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", nargs="?", type=Path, default=DIRECTORY)
    parser.add_argument("--small", action="store_true", help="a few rows of each, for a run of five minutes")
    given = parser.parse_args()
    parts = split(questions(), SMALL if given.small else SIZES)
    given.directory.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        made = [demonstration(row) if name == "demonstrations" else dataset_row(row) for row in rows]
        (given.directory / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        print(f"{given.directory / name}.json: {len(made)} rows")


def questions() -> list[Json]:
    """The leaderboard's rows with their accepted answers."""
    package = importlib.util.find_spec("bfcl_eval")
    if package is None or package.origin is None:
        sys.exit(
            "error: the questions come with the package bfcl-eval; type: pip install --no-deps bfcl-eval==2026.3.23"
        )
    data = Path(package.origin).parent / "data"
    asked, answers = (_lines(folder / f"BFCL_v4_{CATEGORY}.json") for folder in (data, data / "possible_answer"))
    accepted = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [{**row, "accepted": accepted[row["id"]]} for row in asked]


def split(rows: list[Json], sizes: dict[str, int]) -> dict[str, list[Json]]:
    """Disjoint parts of the shuffled rows; smaller sizes take the first rows of the same parts."""
    random.Random(0).shuffle(rows)
    starts = {"heldout": 0, "demonstrations": 100, "train": 200}
    return {name: rows[starts[name] : starts[name] + size] for name, size in sizes.items()}


def dataset_row(row: Json) -> Json:
    """A row of a NAT dataset: the answer is what ``evsys_function_call`` compares with."""
    return {"id": row["id"], "question": _asked(row).model_dump_json(), "answer": json.dumps(_accepted(row))}


def demonstration(row: Json) -> Json:
    """The conversation in which the agent makes the first of the accepted calls."""
    asked, ((name, arguments),) = _asked(row), _accepted(row)[0].items()
    chosen = {key: _first(values) for key, values in arguments.items() if "" not in values}
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(chosen)}}
    prompt = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["workflow"]["system_prompt"]
    return {
        "messages": [
            {"role": "system", "content": prompt},
            {"role": "user", "content": asked.question},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ],
        "tools": [convert_to_openai_tool(tool) for tool in asked.tools()],
    }


def _asked(row: Json) -> Row:
    functions = [
        {
            "name": _function_name(function["name"]),
            "description": function["description"],
            "parameters": _json_schema(function["parameters"]),
        }
        for function in row["function"]
    ]
    return Row(question=row["question"][0][0]["content"], functions=functions)


def _accepted(row: Json) -> list[Json]:
    """The accepted answers; what a function requires may not be omitted, as the leaderboard's checker has it too."""
    required = {function["name"]: function["parameters"].get("required", []) for function in row["function"]}
    return [
        {
            _function_name(name): {
                key: [value for value in values if value != "" or key not in required[name]]
                for key, values in arguments.items()
            }
            for name, arguments in call.items()
        }
        for call in row["accepted"]
    ]


def _first(values: list[Any]) -> Any:
    """The first accepted value; within an object each field has a list of accepted values too."""
    value = values[0]
    if isinstance(value, dict):
        return {key: _first(each) for key, each in value.items() if "" not in each}
    if isinstance(value, list):
        return [_first([each]) for each in value]
    return value


def _function_name(name: str) -> str:
    """OpenAI's names have no dots; the leaderboard replaces them likewise."""
    return name.replace(".", "_")


def _json_schema(schema: Any) -> Any:
    if isinstance(schema, dict):
        made = {key: _json_schema(value) for key, value in schema.items()}
        if isinstance(made.get("type"), str):
            made["type"] = TYPES.get(made["type"], made["type"])
        return made
    return [_json_schema(each) for each in schema] if isinstance(schema, list) else schema


def _lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


if __name__ == "__main__":
    main()
