"""Writes ``data/train.json`` and ``data/heldout.json``: ``python examples/tictactoe/make_data.py``. Always the same.

Each row is an opponent: the order in which it prefers the nine squares. No opponent is in both files.
"""

import json
import random
from pathlib import Path

DATA = Path(__file__).parent / "data"
TRAIN, HELDOUT = 32, 64


def main() -> None:
    """Write both files."""
    rng = random.Random(0)
    orders: dict[str, None] = {}
    while len(orders) < TRAIN + HELDOUT:
        orders["".join(rng.sample("123456789", 9))] = None
    for name, part in (("train", list(orders)[:TRAIN]), ("heldout", list(orders)[TRAIN:])):
        rows = [
            {"id": f"{name}-{number:02d}", "question": f"The opponent prefers {' '.join(order)}.", "answer": "win"}
            for number, order in enumerate(part, 1)
        ]
        text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
        (DATA / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
