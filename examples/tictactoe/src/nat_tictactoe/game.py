"""The board, the opponent, and a game of both."""

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
        shown = [self.taken.get(square, square) for square in SQUARES]
        return "\n".join(" ".join(shown[row : row + 3]) for row in (0, 3, 6))

    def free(self) -> list[str]:
        """The free squares, in order."""
        return [square for square in SQUARES if square not in self.taken]

    def has_won(self, player: Player) -> bool:
        """Whether the player has a line of three."""
        return any(all(self.taken.get(square) == player for square in line) for line in LINES)

    def wins_with(self, player: Player, square: str) -> bool:
        """Whether taking the square would complete a line."""
        return Board({**self.taken, square: player}).has_won(player)


@dataclass(slots=True)
class Game:
    """A game of X, who begins, against the opponent that prefers the squares in an ``order`` of all nine.

    Attributes:
        told: what X is told before its next move: the opponent's last move and the board.
        result: how the game ended for X; None while it goes on.
    """

    order: str
    board: Board = field(default_factory=Board)
    told: str = ""
    result: Result | None = None

    def __post_init__(self) -> None:
        self.told = str(self.board)

    def reply(self, text: str) -> None:
        """X's move, and the opponent's answer. The number of a free square is a move, and nothing else is."""
        move = text.strip()
        if move not in self.board.free():
            self.result = "illegal move"
            return
        self.board.taken[move] = "X"
        if self.board.has_won("X"):
            self.result = "win"
        elif not self.board.free():
            self.result = "draw"
        else:
            self._answer()

    def _answer(self) -> None:
        square = opponent_move(self.board, self.order)
        self.board.taken[square] = "O"
        self.told = f"O takes {square}.\n{self.board}"
        if self.board.has_won("O"):
            self.result = "loss"


def opponent_move(board: Board, order: str) -> str:
    """The opponent's square: one that wins, else the first free one in its ``order``.

    It does not look out for the agent's lines, so it can be beaten; each order is another opponent.
    """
    wanted = [square for square in order if square not in board.taken]
    return next((square for square in wanted if board.wins_with("O", square)), wanted[0])
