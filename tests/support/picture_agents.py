"""An agent that shows the policy a picture and asks about it twice, and the reward for telling dark from bright."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from typing import Any

from langchain_core.messages import HumanMessage
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
from PIL import Image


def picture_url(question: str) -> str:
    """A picture as bright as the question's last word says (0 to 255), of another size for each first word."""
    name, *_, level = question.split()
    file = io.BytesIO()
    Image.new("L", (16 + 4 * len(name), 16), int(level)).convert("RGB").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class PictureAgentConfig(FunctionBaseConfig, name="picture_agent"):
    """Asks what the picture of the row shows, and then whether that is sure; the policy has a choice of two tokens."""

    llm_name: LLMRef
    choices: list[int]
    vocabulary: int


@register_function(config_type=PictureAgentConfig, framework_wrappers=[LLMFrameworkEnum.LANGCHAIN])  # type: ignore[untyped-decorator]  # NAT's
async def picture_agent(config: PictureAgentConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    chat: Any = await builder.get_llm(config.llm_name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)
    banned = {str(token): -100 for token in range(config.vocabulary) if token not in config.choices}
    llm = chat.bind(logit_bias=banned)

    async def _ask(question: str) -> str:
        picture = {"type": "image_url", "image_url": {"url": picture_url(question)}}
        messages: list[Any] = [HumanMessage(content=[{"type": "text", "text": "See "}, picture])]
        first = await llm.ainvoke(messages)
        second = await llm.ainvoke([*messages, first, HumanMessage(content="Sure?")])
        return f"{first.content}|{second.content}"

    yield FunctionInfo.from_fn(_ask, description="Says what a picture shows.")


class BothRepliesConfig(EvaluatorBaseConfig, name="both_replies"):
    """The share of the two replies that are the row's answer."""


@register_evaluator(config_type=BothRepliesConfig)  # type: ignore[untyped-decorator]  # NAT's
async def both_replies(config: BothRepliesConfig, _builder: Any) -> AsyncIterator[EvaluatorInfo]:
    """Yield the evaluator as NAT knows it."""

    class BothReplies(BaseEvaluator):
        async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
            replies = str(item.output_obj).split("|")
            return EvalOutputItem(id=item.id, score=replies.count(item.expected_output_obj) / 2, reasoning={})

    evaluate: Any = BothReplies(max_concurrency=8).evaluate
    yield EvaluatorInfo(config=config, evaluate_fn=evaluate, description="Both replies.")
