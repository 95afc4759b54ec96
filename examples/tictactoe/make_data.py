"""Writes the files in ``data/``: ``python examples/tictactoe/make_data.py``. Always the same.

A row of ``train.json`` and ``heldout.json`` is an opponent: the order in which it prefers the nine squares. The games
in ``demonstrations.json`` are those of a player who takes any of the first three free squares: they show what a move
is, not which one is good. No opponent is in two files.
"""

import json
import random
from pathlib import Path
from typing import Any

from nat_tictactoe.game import SQUARES, Game
from nat_tictactoe.register import PROMPT

DATA = Path(__file__).parent / "data"
SIZES = {"train": 32, "heldout": 64, "demonstrations": 48}


def main() -> None:
    """Write all files."""
    make(DATA)


def make(directory: Path) -> None:
    """Write all files into ``directory``."""
    rng = random.Random(0)
    orders: dict[str, None] = {}
    while len(orders) < sum(SIZES.values()):
        orders["".join(rng.sample(SQUARES, 9))] = None
    left = iter(orders)
    for name, size in SIZES.items():
        part = [next(left) for _ in range(size)]
        if name == "demonstrations":
            rows = [random_game(order, rng) for order in part]
        else:
            rows = [row(f"{name}-{number:02d}", order) for number, order in enumerate(part, 1)]
        text = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
        (directory / f"{name}.json").write_text(text, encoding="utf-8")


def row(row_id: str, order: str) -> dict[str, Any]:
    """A row of a NAT dataset."""
    return {"id": row_id, "question": f"The opponent prefers {' '.join(order)}.", "answer": "win"}


def random_game(order: str, rng: random.Random) -> dict[str, Any]:
    """A game as the agent's conversation, in which each move is any of the first three free squares."""
    game, messages = Game(order), [{"role": "system", "content": PROMPT}]
    while game.result is None:
        move = rng.choice(game.board.free()[:3])
        messages += [{"role": "user", "content": game.told}, {"role": "assistant", "content": move}]
        game.reply(move)
    return {"messages": messages}


if __name__ == "__main__":
    main()
