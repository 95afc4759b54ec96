"""The board and the opponent."""

import re
from dataclasses import dataclass, field
from typing import Literal

Player = Literal["X", "O"]
Result = Literal["win", "draw", "loss", "illegal move"]

SQUARES = "123456789"
LINES = ("123", "456", "789", "147", "258", "369", "159", "357")


@dataclass(slots=True)
class Board:
    """Nine squares, each free or taken."""

    taken: dict[str, Player] = field(default_factory=dict)

    def __str__(self) -> str:
        """Three lines of three: a free square shows its number, the others who took them."""
        shown = "".join(self.taken.get(square, square) for square in SQUARES)
        return "\n".join(shown[row : row + 3] for row in (0, 3, 6))

    def free(self) -> list[str]:
        """The free squares, in order."""
        return [square for square in SQUARES if square not in self.taken]

    def has_won(self, player: Player) -> bool:
        """Whether the player has a line of three."""
        return any(all(self.taken.get(square) == player for square in line) for line in LINES)

    def wins_with(self, player: Player, square: str) -> bool:
        """Whether taking the square would complete a line."""
        return Board({**self.taken, square: player}).has_won(player)


def opponent_move(board: Board, order: str) -> str:
    """The opponent's square: one that wins, else the first free one in its ``order`` of the nine squares.

    It does not look out for the agent's lines, so it can be beaten; each order is another opponent.
    """
    wanted = [square for square in order if square not in board.taken]
    return next((square for square in wanted if board.wins_with("O", square)), wanted[0])


def read_move(reply: str) -> str | None:
    """The first digit of a reply, or None."""
    found = re.search("[1-9]", reply)
    return found[0] if found else None
