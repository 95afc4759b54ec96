"""The tasks as NAT knows them: an agent of one reply, or of two with a tool, and the reward as an evaluator."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Literal

from nat.data_models.component_ref import LLMRef
from nat.data_models.evaluator import EvalInputItem, EvaluatorBaseConfig
from nat.plugin_api import (
    Builder,
    EvaluatorInfo,
    FunctionBaseConfig,
    FunctionInfo,
    LLMFrameworkEnum,
    register_evaluator,
    register_function,
)
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem
from nat.plugins.eval.evaluator.base_evaluator import BaseEvaluator
from tasks import task


class TaskAgentConfig(FunctionBaseConfig, name="task_agent"):
    """Answers a row of a task."""

    task: str
    llm_name: LLMRef


@register_function(config_type=TaskAgentConfig)
async def task_agent(config: TaskAgentConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    llm = await builder.get_llm(config.llm_name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)
    chosen = task(config.task)
    rows = {row["question"]: row for row in [*chosen.train, *chosen.heldout]}

    async def _answer(question: str) -> str:
        row = rows[question]
        messages = chosen.messages(row)
        reply = str((await llm.ainvoke(messages)).content)
        if chosen.tool is None:
            return reply
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": chosen.tool(row, reply)}]
        return str((await llm.ainvoke(messages)).content)

    yield FunctionInfo.from_fn(_answer, description="Answers.")


class TaskRewardConfig(EvaluatorBaseConfig, name="task_reward"):
    """The task's own reward, or one that is wrong on purpose.

    ``constant``: the same for every reply; ``length``: the longer the better; ``nan``: NaN for one reply in a hundred.
    """

    task: str
    trouble: Literal["constant", "length", "nan"] | None = None


class _TaskReward(BaseEvaluator):
    _rewarded: ClassVar[int] = 0
    """In the process: NAT makes a new evaluator for every epoch."""

    def __init__(self, config: TaskRewardConfig) -> None:
        super().__init__(max_concurrency=8)
        self._task = task(config.task)
        self._trouble = config.trouble

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        _TaskReward._rewarded += 1
        reply = str(item.output_obj)
        reward = self._task.reward(item.full_dataset_entry, reply)
        if self._trouble == "constant":
            reward = 0.5
        if self._trouble == "length":
            reward = min(1.0, len(reply) / 40)
        if self._trouble == "nan" and _TaskReward._rewarded % 100 == 0:
            reward = math.nan
        return EvalOutputItem(id=item.id, score=reward, reasoning=None)


@register_evaluator(config_type=TaskRewardConfig)
async def task_reward(config: TaskRewardConfig, _builder: Any) -> AsyncIterator[EvaluatorInfo]:
    """Yield the evaluator as NAT knows it."""
    yield EvaluatorInfo(config=config, evaluate_fn=_TaskReward(config).evaluate, description="Rewards.")
