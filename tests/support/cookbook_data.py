"""What the cookbook's programs would fetch from a hub, as directories of the names that they ask for.

`datasets.load_dataset` takes a directory of that name below the working directory for what is on the hub. The tasks are
small ones of the same form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

THINGS = ("the sun", "a cat", "bread", "rain", "a bicycle", "the moon", "tea", "a river", "snow", "a clock", "music")
LANGUAGES = {
    "en": "And he said, Mama, I'm home.",
    "de": "und er hat gesagt, Mama ich bin daheim.",
    "es": "Y él dijo: Mamá, estoy en casa.",
    "fr": "Et il a dit, maman, je suis à la maison.",
}


GSM8K_CARD = """---
configs:
- config_name: main
  data_files: train.jsonl
---
"""
"""The data set is asked for by the name of its configuration too."""


def write(directory: Path, pairs: int = 64) -> None:
    """All data sets, below the directory that the programs run in."""
    random = Random(0)
    for name, rows in (
        ("chat.jsonl", _sums(random, 40 * 16)),
        ("languages.jsonl", (_conversation(text, name) for _ in range(8) for name, text in LANGUAGES.items())),
        ("Anthropic/hh-rlhf/train.jsonl", _preferences(random, pairs)),
        ("Anthropic/hh-rlhf/test.jsonl", _preferences(random, 4)),
        ("zwhe99/DeepMath-103K/train.jsonl", ({"question": _sum(random)[0]} for _ in range(pairs))),
        ("hicai-zju/SciKnowEval/test.jsonl", _choices(random, pairs)),
        ("HuggingFaceH4/no_robots/train.jsonl", _sums(random, pairs)),
        ("openai/gsm8k/train.jsonl", _word_problems(random, pairs)),
    ):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / "openai/gsm8k/README.md").write_text(GSM8K_CARD)


def _conversation(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]}


def _sum(random: Random) -> tuple[str, str]:
    x, y = random.randint(0, 100), random.randint(0, 100)
    return f"What is {x} + {y}?", str(x + y)


def _sums(random: Random, count: int) -> Iterable[dict[str, Any]]:
    """Conversations with the example that `math_rl` shows before its arithmetic."""
    return (_conversation("What is 4 + 5?", "9", *_sum(random)) for _ in range(count))


def _word_problems(random: Random, count: int) -> Iterable[dict[str, Any]]:
    """The answer behind the mark that GSM8K has."""
    for _ in range(count):
        x, y = random.randint(1, 4), random.randint(1, 4)
        question = f"Tom has {x} apples and buys {y} more. How many apples has Tom?"
        yield {"question": question, "answer": f"{x} + {y} = {x + y}\n#### {x + y}"}


def _preferences(random: Random, count: int) -> Iterable[dict[str, Any]]:
    for _ in range(count):
        thing = random.choice(THINGS)
        asked = f"\n\nHuman: {random.choice(('Tell me about', 'Describe'))} {thing}.\n\nAssistant: "
        good, bad = f"{thing.capitalize()} is a fine thing.", f"I do not want to talk about {thing}."
        yield {"chosen": asked + good, "rejected": asked + bad}


def _choices(random: Random, count: int) -> Iterable[dict[str, Any]]:
    """Multiple-choice questions as SciKnowEval has them."""
    for _ in range(count):
        x, y = random.randint(1, 9), random.randint(1, 9)
        options = [x + y, x + y + 1, x + y + 2, x * y + 30]
        random.shuffle(options)
        yield {
            "domain": "Chemistry",
            "details": {"level": "L3"},
            "type": "mcq-4-choices",
            "question": f"How many atoms are {x} atoms and {y} atoms?",
            "choices": {"label": list("ABCD"), "text": [str(option) for option in options]},
            "answerKey": "ABCD"[options.index(x + y)],
        }
