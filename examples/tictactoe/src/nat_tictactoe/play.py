"""One game: the agent's moves are the turns of one conversation."""

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from nat_tictactoe.game import SQUARES, Board, Result, opponent_move, read_move


async def play(llm: BaseChatModel, opponent: str, system_prompt: str) -> Result:
    """Play X against the opponent that prefers the squares in the order of ``opponent``'s digits.

    Raises:
        ValueError: its digits are no order of the nine squares.
    """
    order = "".join(character for character in opponent if character.isdigit())
    if sorted(order) != list(SQUARES):
        raise ValueError(f"{opponent!r} names no order of the nine squares; an example: 5 1 9 3 7 2 8 4 6")
    board, messages = Board(), list[BaseMessage]([SystemMessage(system_prompt)])
    said = ""
    while True:
        messages.append(HumanMessage(f"{said}{board}"))
        reply = await llm.ainvoke(messages)
        messages.append(AIMessage(reply.content))
        move = read_move(str(reply.content))
        if move is None or move in board.taken:
            return "illegal move"
        board.taken[move] = "X"
        if board.has_won("X"):
            return "win"
        if not board.free():
            return "draw"
        answer = opponent_move(board, order)
        board.taken[answer] = "O"
        if board.has_won("O"):
            return "loss"
        said = f"O takes {answer}.\n"
