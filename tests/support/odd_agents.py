"""NAT components that go wrong in every way a workflow or an evaluator can; found by the ``agents`` fixture."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import openai
from nat.data_models.component_ref import FunctionRef, LLMRef
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

from nat_plugin_evsys import policy_endpoint


class OddAgentConfig(FunctionBaseConfig, name="odd_agent"):
    """Does what its row says (``behaviour: question``), with an OpenAI client of its own."""

    llm_name: str = "policy"


@register_function(config_type=OddAgentConfig)
async def odd_agent(config: OddAgentConfig, _builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    kept = policy_endpoint(config.llm_name)
    client = openai.AsyncOpenAI(base_url=kept.base_url, api_key=kept.api_key)

    async def ask(text: str, **options: Any) -> str:
        reply = await client.chat.completions.create(
            model=config.llm_name, messages=[{"role": "user", "content": text}], **options
        )
        return reply.choices[0].message.content or ""

    async def _ask(question: str) -> str:
        return await BEHAVIOURS[question.split(":")[0]](ask, question)

    yield FunctionInfo.from_fn(_ask, description="Answers a question.")
    await client.close()


Ask = Callable[..., Awaitable[Any]]


async def _fine(ask: Ask, question: str) -> str:
    return str(await ask(question))


async def _long(ask: Ask, question: str) -> str:
    return str(await ask("too long " * 20_000))


async def _refused(ask: Ask, question: str) -> str:
    return str(await ask(question, n=0))


async def _swallow(ask: Ask, question: str) -> str:
    try:
        return str(await ask(question, n=0))
    except openai.BadRequestError:
        return "Sorry, something went wrong."


async def _broken(ask: Ask, question: str) -> str:
    raise LookupError("the ticket system has no such ticket")


async def _ill(ask: Ask, question: str) -> str:
    """Fail after its call where the environment says so."""
    said = str(await ask(question))
    if "EVSYS_TEST_ILL" in os.environ:
        raise ConnectionError("the ticket system is down")
    return said


async def _exit(ask: Ask, question: str) -> str:
    await ask(question)
    await asyncio.gather(asyncio.to_thread(sys.exit, 3))  # as a tool in a task does it
    return "never"


async def _early(ask: Ask, question: str) -> str:
    """Stop reading the stream after its first words."""
    kept = policy_endpoint()
    async with openai.AsyncOpenAI(base_url=kept.base_url, api_key=kept.api_key) as client:
        stream = await client.chat.completions.create(
            model=kept.model, messages=[{"role": "user", "content": question}], stream=True, max_tokens=400
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                await stream.close()
                return chunk.choices[0].delta.content
    return ""


BEHAVIOURS: dict[str, Callable[[Ask, str], Awaitable[str]]] = {
    "fine": _fine,
    "hang": _fine,  # it is the evaluator that hangs
    "long": _long,
    "refused": _refused,
    "swallow": _swallow,
    "broken": _broken,
    "ill": _ill,
    "exit": _exit,
    "early": _early,
}


class RelayConfig(FunctionBaseConfig, name="relay"):
    """Gives its input to the first function, what comes out to the next, and so on."""

    functions: list[FunctionRef]


@register_function(config_type=RelayConfig)
async def relay(config: RelayConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    functions = [await builder.get_function(name) for name in config.functions]

    async def _relay(question: str) -> str:
        for function in functions:
            question = str(await function.ainvoke(question, to_type=str)) or "nothing"
        return question

    yield FunctionInfo.from_fn(_relay, description="Relays.")


class ChoirConfig(FunctionBaseConfig, name="choir"):
    """Gives its input to each function; what they say is joined by ``|``."""

    functions: list[FunctionRef]


@register_function(config_type=ChoirConfig)
async def choir(config: ChoirConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the workflow as NAT knows it."""
    functions = [await builder.get_function(name) for name in config.functions]

    async def _choir(question: str) -> str:
        said = [str(await function.ainvoke(question, to_type=str)).replace("|", " ") for function in functions]
        return "|".join(said)

    yield FunctionInfo.from_fn(_choir, description="Speaks with one voice.")


class VoiceJudgeConfig(EvaluatorBaseConfig, name="voice_judge"):
    """Rewards the vowels in what one function of a choir said."""

    voice: int = 0


class _VoiceJudge(BaseEvaluator):
    def __init__(self, config: VoiceJudgeConfig) -> None:
        super().__init__(max_concurrency=8)
        self._voice = config.voice

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        said = str(item.output_obj).split("|")[self._voice]
        return EvalOutputItem(id=item.id, score=sum(letter in "aeiou" for letter in said), reasoning="its vowels")


@register_evaluator(config_type=VoiceJudgeConfig)
async def voice_judge(config: VoiceJudgeConfig, _builder: Any) -> AsyncIterator[EvaluatorInfo]:
    """Yield the evaluator as NAT knows it."""
    judge = _VoiceJudge(config)
    yield EvaluatorInfo(config=config, evaluate_fn=judge.evaluate, description="Vowels.")  # type: ignore[arg-type]


class SpeakerConfig(FunctionBaseConfig, name="speaker"):
    """One call of its LLM."""

    llm_name: LLMRef


@register_function(config_type=SpeakerConfig)
async def speaker(config: SpeakerConfig, builder: Builder) -> AsyncIterator[FunctionInfo]:
    """Yield the function as NAT knows it."""
    llm = await builder.get_llm(config.llm_name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)

    async def _speak(question: str) -> str:
        return str((await llm.ainvoke(question)).content)

    yield FunctionInfo.from_fn(_speak, description="Says something.")


class OddJudgeConfig(EvaluatorBaseConfig, name="odd_judge"):
    """Rewards long answers, when it has asked its LLM or has waited; hangs at the rows that begin with ``hang``."""

    llm_name: LLMRef | None = None
    hang: str = "hang"


class _OddJudge(BaseEvaluator):
    def __init__(self, config: OddJudgeConfig, llm: Any) -> None:
        super().__init__(max_concurrency=8)
        self._config, self._llm = config, llm

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        if str(item.input_obj).startswith(self._config.hang):
            await asyncio.Event().wait()
        if self._llm is not None:
            await self._llm.ainvoke(f"Is this good? {item.output_obj}")
        return EvalOutputItem(id=item.id, score=len(str(item.output_obj)) / 100, reasoning="its length")


@register_evaluator(config_type=OddJudgeConfig)
async def odd_judge(config: OddJudgeConfig, builder: Any) -> AsyncIterator[EvaluatorInfo]:
    """Yield the evaluator as NAT knows it."""
    name = config.llm_name
    llm = None if name is None else await builder.get_llm(name, wrapper_type=LLMFrameworkEnum.LANGCHAIN)
    judge = _OddJudge(config, llm)
    yield EvaluatorInfo(config=config, evaluate_fn=judge.evaluate, description="Length.")  # type: ignore[arg-type]


class MoodyJudgeConfig(EvaluatorBaseConfig, name="moody_judge"):
    """Rewards every other answer to a row, from the first or (``late``) the sixth on, or (``never``) none."""


class _MoodyJudge(BaseEvaluator):
    asked: ClassVar[Counter[str]] = Counter()

    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        question = str(item.input_obj)
        self.asked[question] += 1
        first = {"late": 6, "never": sys.maxsize}.get(question, 0)
        score = float(self.asked[question] >= first and self.asked[question] % 2)
        return EvalOutputItem(id=item.id, score=score, reasoning="its mood")


@register_evaluator(config_type=MoodyJudgeConfig)
async def moody_judge(config: MoodyJudgeConfig, _builder: Any) -> AsyncIterator[EvaluatorInfo]:
    """Yield the evaluator as NAT knows it."""
    judge = _MoodyJudge(max_concurrency=8)
    yield EvaluatorInfo(config=config, evaluate_fn=judge.evaluate, description="Moods.")  # type: ignore[arg-type]
