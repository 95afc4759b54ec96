"""Runs that cannot go well, and what each says within two passes: python benchmarks/learning/troubles.py [NAME …]

Real runs of `nat finetune` on the help desk with the real model. Passes if each says what is wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ours
from tasks import helpdesk

from nat_plugin_evsys.json_lines import read_json_lines

RATE = 5e-4
PASSES = 2


@dataclass(frozen=True)
class Trouble:
    """What is made wrong, and which findings or words of the console name it; one of them is enough."""

    break_it: Callable[[dict[str, Any]], None]
    findings: tuple[str, ...] = ()
    words: str = ""


def _reward(trouble: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["eval"]["evaluators"]["reward"].update(trouble=trouble)


def _rate(factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["trainer_adapters"]["adapter"].update(learning_rate=RATE * factor)


TROUBLES = {
    "a reward that is constant": Trouble(_reward("constant"), ("same_reward",)),
    "a reward that pays for length": Trouble(_reward("length"), ("cut_off",)),
    "one NaN in 100 rewards": Trouble(_reward("nan"), words="the others have none"),
    "a learning rate 100 times too high": Trouble(_rate(100), ("moved_far", "one_answer", "fallen", "low_entropy")),
}


def said(trouble: Trouble) -> tuple[bool, str]:
    """Whether a run said what is wrong, and how it ended."""
    task = helpdesk()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        config = ours.settings(task, RATE, 0, work, PASSES)
        trouble.break_it(config)
        exit_code, log = ours.finetune(task, config, work)
        rows = read_json_lines(ours.run_directory(work) / "metrics.jsonl")
    found = {finding["id"]: finding["sentence"] for row in rows for finding in row.get("findings", ())}
    named = [sentence for name, sentence in found.items() if name in trouble.findings]
    named += [line.strip() for line in log.splitlines() if trouble.words and trouble.words in line][:1]
    return bool(named), "\n".join([f"  exit code {exit_code}", *(f"  {each}" for each in named or found.values())])


def main() -> None:
    """Run each, and print what it said."""
    silent = []
    for name in sys.argv[1:] or TROUBLES:
        spoke, text = said(TROUBLES[name])
        print(f"{name}: {'ok' if spoke else 'NOT SAID'}\n{text}", flush=True)
        silent += [] if spoke else [name]
    sys.exit(1 if silent else 0)


if __name__ == "__main__":
    main()
