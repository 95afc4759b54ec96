"""A ticket that one LLM routes and another checks: two roles, each with its own reward."""

from collections.abc import Sequence
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, SystemMessage
from nat.data_models.evaluator import EvalInputItem
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem
from nat.plugins.eval.evaluator.base_evaluator import BaseEvaluator

TEAMS = ("network", "printing", "accounts", "payroll")
VERDICTS = ("yes", "no")


async def checked(proposer: BaseChatModel, checker: BaseChatModel, ticket: str) -> str:
    """``network, yes``: the team that the proposer names, and whether the checker thinks it right."""
    team = await _choose(proposer, "Name the team that should help.", ticket, TEAMS)
    verdict = await _choose(checker, "Is this the right team?", f"{ticket} Team: {team}", VERDICTS)
    return f"{team}, {verdict}"


def verdict_reward(output: str, expected: str) -> float:
    """What the checker earns: 1 for a yes to the right team, 0 for a wrong verdict.

    A no to a wrong team earns a third: three of four guessed teams are wrong, so with the same reward for both the
    checker would soon say no, whatever it reads.
    """
    team, _, verdict = output.partition(", ")
    if (verdict == "yes") != (team == expected):
        return 0.0
    return 1.0 if verdict == "yes" else 1 / (len(TEAMS) - 1)


class VerdictEvaluator(BaseEvaluator):
    """Rewards the checker."""

    def __init__(self) -> None:
        super().__init__(tqdm_desc="Verdicts")

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        """Score one ticket."""
        output, expected = str(item.output_obj), str(item.expected_output_obj)
        reasoning = {"output": output, "expected": expected}
        return EvalOutputItem(id=item.id, score=verdict_reward(output, expected), reasoning=reasoning)


async def _choose(llm: BaseChatModel, system_prompt: str, text: str, choices: Sequence[str]) -> str:
    """The reply, which is one of the ``choices``: the endpoint samples nothing else."""
    form: dict[str, Any] = {
        "type": "json_schema",
        "json_schema": {"name": "choice", "strict": True, "schema": {"type": "string", "enum": list(choices)}},
    }
    reply = await llm.bind(response_format=form).ainvoke([SystemMessage(system_prompt), HumanMessage(text)])
    return str(reply.content).strip().strip('"')
