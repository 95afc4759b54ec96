"""One game: the agent's moves are the turns of one conversation."""

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage

from nat_tictactoe.game import SQUARES, Game, Result


async def play(llm: BaseChatModel, opponent: str, system_prompt: str) -> Result:
    """Play X against the opponent that prefers the squares in the order of ``opponent``'s digits.

    Raises:
        ValueError: its digits are no order of the nine squares.
    """
    order = "".join(character for character in opponent if character.isdigit())
    if sorted(order) != list(SQUARES):
        raise ValueError(f"{opponent!r} names no order of the nine squares; an example: 5 1 9 3 7 2 8 4 6")
    game, messages = Game(order), list[BaseMessage]([SystemMessage(system_prompt)])
    while game.result is None:
        messages.append(HumanMessage(game.told))
        reply = await llm.ainvoke(messages)
        messages.append(AIMessage(reply.content))
        game.reply(str(reply.content))
    return game.result
