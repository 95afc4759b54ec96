"""Fakes for tests of workflows: what the policy says is given, everything else is real.

client = ScriptedSamplingClient(tokenizer, ["<tool_call>…</tool_call>", "The sum is 5."])
endpoint = PolicyEndpoint(sampling_client=lambda: client, …)
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.backends.base import given_params
from nat_plugin_evsys.calls import StopReason
from nat_plugin_evsys.errors import PromptTooLongError

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.backends.base import Constraint, TokenCallback

Reply = str | Sequence[int] | Exception
Script = Sequence[Reply] | Callable[[list[int]], Reply]


@dataclass(frozen=True, slots=True)
class ScriptedRequest:
    """What a ScriptedSamplingClient was asked."""

    prompt_ids: list[int]
    num_samples: int
    params: types.SamplingParams


class ScriptedSamplingClient:
    """A ``SamplingClient`` that says what it is told to.

    Stop strings, stop tokens and ``max_tokens`` end a reply as they do in the engine. The tokens' logprobs are made up
    (``-(1 + position) / 8``), and so are the ``topk_sample_logprobs`` (the token itself, then ids 0, 1, …).

    Args:
        tokenizer: turns text into ids; the EOS token is added to a text, not to ids.
        script: a reply for each sample in turn (text, ids, or an exception to raise), or a function from the prompt's
            ids to the reply.
        context_length: prompts that leave no room are refused as by the engine.
        token_delay: seconds from token to token.

    Attributes:
        requests: what was asked, in order.
        cancelled: requests whose awaiting task was cancelled.
    """

    def __init__(
        self,
        tokenizer: Any,
        script: Script,
        *,
        policy_version: int = 0,
        context_length: int = 32768,
        token_delay: float = 0.0,
    ) -> None:
        self.policy_version = policy_version
        self.requests: list[ScriptedRequest] = []
        self.cancelled = 0
        self._tokenizer = tokenizer
        self._script = script
        self._used = 0
        self._lock = threading.Lock()
        self._context_length = context_length
        self._token_delay = token_delay

    @property
    def grammars(self) -> None:
        """A script cannot be constrained."""

    async def sample_async(
        self,
        prompt: types.ModelInput,
        num_samples: int = 1,
        sampling_params: types.SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        params: types.SamplingParams | None = None,
        topk_sample_logprobs: int = 0,
        on_tokens: TokenCallback | None = None,
        constraint: Constraint | None = None,
    ) -> types.SampleResponse:
        """The next replies of the script, one for each sample.

        Raises:
            PromptTooLongError: the prompt leaves no room in the context window.
            NotImplementedError: prompt logprobs or a constraint are asked for; there is no model.
        """
        from tinker import types

        if constraint is not None:
            raise NotImplementedError("ScriptedSamplingClient has no model whose decoding could be constrained")
        if include_prompt_logprobs or topk_prompt_logprobs:
            raise NotImplementedError("ScriptedSamplingClient has no model to give prompt logprobs")
        given = given_params(sampling_params, params)
        prompt_ids = prompt.to_ints()
        self.requests.append(ScriptedRequest(prompt_ids, num_samples, given))
        room = self._context_length - len(prompt_ids)
        if room < 1:
            raise PromptTooLongError(len(prompt_ids), given.max_tokens or 1, self._context_length)
        limit = min(room, given.max_tokens or room)
        replies = [self._cut(self._next(prompt_ids), given, limit) for _ in range(num_samples)]
        try:
            await self._stream([ids for ids, _ in replies], on_tokens)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return types.SampleResponse(
            sequences=[
                types.SampledSequence(
                    stop_reason=stop_reason,
                    sequence_id=f"scripted-{len(self.requests)}-{index}",
                    _tokens_list=ids,
                    _logprobs_list=_logprobs(ids),
                    _topk_logprobs_list=_top(ids, topk_sample_logprobs) if topk_sample_logprobs else None,
                )
                for index, (ids, stop_reason) in enumerate(replies)
            ]
        )

    async def compute_logprobs_async(self, prompt: types.ModelInput) -> list[float | None]:
        """There is no model.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("ScriptedSamplingClient has no model to give prompt logprobs")

    def _next(self, prompt_ids: list[int]) -> list[int]:
        if callable(self._script):
            reply = self._script(prompt_ids)
        else:
            with self._lock:
                if self._used >= len(self._script):
                    raise AssertionError(f"the script has {len(self._script)} replies, and one more was requested")
                reply = self._script[self._used]
                self._used += 1
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, str):
            return [*self._tokenizer(reply, add_special_tokens=False)["input_ids"], self._tokenizer.eos_token_id]
        return list(reply)

    def _cut(self, ids: list[int], params: types.SamplingParams, limit: int) -> tuple[list[int], StopReason]:
        stop = params.stop
        items: list[Any] = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
        strings = [item for item in items if isinstance(item, str)]
        eos = set() if stop == [] else {self._tokenizer.eos_token_id}  # an empty list stops at nothing
        ends = {item for item in items if isinstance(item, int)} | eos
        for length, token_id in enumerate(ids[:limit], start=1):
            text = self._tokenizer.decode(ids[:length]) if strings else ""
            if token_id in ends or any(string in text for string in strings):
                return ids[:length], "stop"
        return ids[:limit], "length"

    async def _stream(self, replies: list[list[int]], on_tokens: TokenCallback | None) -> None:
        for position in range(max(map(len, replies), default=0)):
            if self._token_delay:
                await asyncio.sleep(self._token_delay)
            if on_tokens is None:
                continue
            for index, ids in enumerate(replies):
                if position < len(ids):  # from another thread, as the engine does
                    await asyncio.to_thread(on_tokens, index, [ids[position]], [_logprobs(ids)[position]])


def _logprobs(ids: Sequence[int]) -> list[float]:
    return [-(1 + position) / 8 for position in range(len(ids))]


def _top(ids: Sequence[int], k: int) -> list[list[tuple[int, float]] | None]:
    others = [(token_id, -math.inf) for token_id in range(k - 1)]
    return [[(token_id, logprob), *others] for token_id, logprob in zip(ids, _logprobs(ids), strict=True)]
