"""What NAT discovers: ``tictactoe_agent``, which plays one game against the opponent of its row."""

from collections.abc import AsyncIterator

from nat.plugin_api import Builder, FunctionBaseConfig, FunctionInfo, LLMFrameworkEnum, LLMRef, register_function
from pydantic import ConfigDict, Field

PROMPT = "You play tic-tac-toe as X. Answer with the number of a free square, nothing else."


class TicTacToeConfig(FunctionBaseConfig, name="tictactoe_agent"):
    """Plays X. The input names the opponent's order of the nine squares; the answer is how the game ended."""

    model_config = ConfigDict(extra="forbid")

    llm_name: LLMRef = Field(description="The LLM that plays.")
    system_prompt: str = Field(default=PROMPT, description="System prompt of every game.")


@register_function(config_type=TicTacToeConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])
async def tictactoe_agent(config: TicTacToeConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    from nat_tictactoe.play import play

    llm = await builder.get_llm(config.llm_name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def _play(opponent: str) -> str:
        return await play(llm, opponent, config.system_prompt)

    yield FunctionInfo.from_fn(_play, description="Plays a game of tic-tac-toe and tells how it ended.")
