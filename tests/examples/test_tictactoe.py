"""The game, the opponent, and a game played by a model whose replies are given."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from nat_tictactoe.game import LINES, SQUARES, Board, Game, opponent_move
from nat_tictactoe.play import play
from pydantic import Field

DATA = Path(__file__).parents[2] / "examples/tictactoe/data"
UPWARDS = "The opponent prefers 1 2 3 4 5 6 7 8 9."


class Transcript(FakeListChatModel):
    """Says its replies in turn and keeps what it was asked."""

    asked: list[str] = Field(default_factory=list)

    def _call(self, messages, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.asked.append(str(messages[-1].content))
        return super()._call(messages, *args, **kwargs)


@pytest.mark.parametrize(
    ("replies", "result"),
    [
        (["5", "3", "7"], "win"),
        (["9", "8", "4"], "loss"),
        (["I take 5.", "5"], "illegal move"),
        (["the middle"], "illegal move"),
        (["0"], "illegal move"),
    ],
)
async def test_a_game_ends_as_it_must(replies: list[str], result: str) -> None:
    assert await play(Transcript(responses=replies), UPWARDS, "Play.") == result


async def test_a_draw_fills_the_board() -> None:
    # X: 5 2 7 6 9, O: 1 8 3 4
    model = Transcript(responses=["5", "2", "7", "6", "9"])
    assert await play(model, "The opponent prefers 1 8 3 4 2 5 6 7 9.", "Play.") == "draw"


async def test_each_turn_shows_the_opponents_move_and_the_board() -> None:
    model = Transcript(responses=["5", "9", "5"])
    assert await play(model, UPWARDS, "Play.") == "illegal move"
    assert model.asked == ["1 2 3\n4 5 6\n7 8 9", "O takes 1.\nO 2 3\n4 X 6\n7 8 9", "O takes 2.\nO O 3\n4 X 6\n7 8 X"]


async def test_what_names_no_opponent_is_refused() -> None:
    with pytest.raises(ValueError, match="no order of the nine squares"):
        await play(Transcript(responses=["5"]), "The opponent prefers 1 1 1.", "Play.")


def test_the_opponent_takes_a_win_before_what_it_prefers() -> None:
    board = Board({"1": "O", "2": "O", "5": "X", "9": "X"})
    assert opponent_move(board, "987654321") == "3"
    assert opponent_move(Board({"9": "X"}), "987654321") == "8"


def test_lines_are_the_eight_of_the_game() -> None:
    rows = [(r, c) for r in range(3) for c in range(3)]
    aligned = {
        "".join(sorted(SQUARES[3 * r + c] for r, c in three))
        for three in itertools.combinations(rows, 3)
        if len({r for r, _ in three}) == 1
        or len({c for _, c in three}) == 1
        or {r - c for r, c in three} == {0}
        or {r + c for r, c in three} == {2}
    }
    assert aligned == set(LINES)


@pytest.mark.parametrize(
    ("reply", "legal"),
    [
        ("5", True),
        (" 7\n", True),
        ("1", False),
        ("7.", False),
        ("O 2 3", False),
        ("23", False),
        ("0", False),
        ("", False),
    ],
)
def test_only_the_number_of_a_free_square_is_a_move(reply: str, legal: bool) -> None:
    game = Game("987654321", Board({"1": "O"}))
    game.reply(reply)
    assert (game.result != "illegal move") is legal


def test_the_committed_files_are_what_make_data_writes(
    load_script: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    load_script("tictactoe/make_data.py").make(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in DATA.iterdir()}


async def test_a_demonstration_is_a_game_as_the_agent_plays_it() -> None:
    for shown in json.loads((DATA / "demonstrations.json").read_text()):
        system, *turns = shown["messages"]
        told, moves = ([message["content"] for message in turns[first::2]] for first in (0, 1))
        answers = [text.partition(".")[0].removeprefix("O takes ") for text in told[1:]]
        order = "".join([*answers, *(square for square in SQUARES if square not in answers)])
        model = Transcript(responses=moves)
        assert await play(model, order, system["content"]) != "illegal move"
        assert model.asked == told


def test_every_opponent_can_be_beaten_and_none_is_in_both_files() -> None:
    files = [json.loads((DATA / f"{name}.json").read_text()) for name in ("train", "heldout")]
    orders = ["".join(filter(str.isdigit, row["question"])) for rows in files for row in rows]
    assert len(set(orders)) == len(orders) == 96
    assert all(wins(order) for order in orders)


def wins(order: str) -> bool:
    """Whether some sequence of moves beats the opponent; random play finds one soon."""
    rng = random.Random(0)
    return any(random_game(order, rng) for _ in range(500))


def random_game(order: str, rng: random.Random) -> bool:
    board = Board()
    while True:
        board.taken[rng.choice(board.free())] = "X"
        if board.has_won("X") or not board.free():
            return board.has_won("X")
        board.taken[opponent_move(board, order)] = "O"
        if board.has_won("O"):
            return False
