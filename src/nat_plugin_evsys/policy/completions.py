"""One chat completion: request -> prompt ids -> samples -> recorded calls -> choices."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.backends.base import shaped_by
from nat_plugin_evsys.call_images import with_references
from nat_plugin_evsys.calls import Call, RunKind
from nat_plugin_evsys.errors import ApiError, EvsysError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.history import History, Prompt, turn_of
from nat_plugin_evsys.policy.logprobs import TokenNames
from nat_plugin_evsys.policy.prompts import PlainPrompt, prompt_of
from nat_plugin_evsys.policy.protocol import Choice, ChoiceLogprobs, FinishReason, PromptLogprobs, Usage
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.policy.rendering.chat_template import opens_thinking
from nat_plugin_evsys.policy.rendering.images import model_input
from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.sampling import SamplingDefaults, check_hints, constraint_of, sampling_params
from nat_plugin_evsys.policy.streaming import ReplyText, cut_at_stop, text_ids
from nat_plugin_evsys.policy.tool_calls import TextParser, assemble

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.backends.base import Constraint, SamplingClient, TokenCallback
    from nat_plugin_evsys.config.policy import HintMode


@dataclass(frozen=True, slots=True)
class PolicySource:
    """Where requests find the current policy; see ``PolicyEndpoint``.

    Attributes:
        history: the turns that later prompts may start with; None keeps none.
        scope: keeps the turns of sources apart that share a history.
    """

    renderer: Callable[[], ChatRenderer | Awaitable[ChatRenderer]]
    sampling_client: Callable[[], SamplingClient | Awaitable[SamplingClient]]
    recorder: Recorder
    defaults: Callable[[RunKind | None], SamplingDefaults]
    held_client: Callable[[], SamplingClient | None] = lambda: None
    hints: HintMode = "honour"
    history: History | None = None
    scope: str = ""

    def scope_of(self, run_id: str | None) -> str:
        """What keeps a rollout's turns apart from those of others."""
        return f"{self.scope}\n{run_id or ''}"


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that is ready to be sampled, with everything its record needs.

    Attributes:
        is_plain: whether the prompt has no messages; its reply is text as it was sampled.
        thinking: whether the prompt ends inside a ``<think>`` block; a plain prompt never does.
        constraint: the grammar of the form that the request asks for; None samples freely.
        unmet: why the request's ``hints`` are not followed; empty where they are.
    """

    id: str
    created: int
    request: ChatCompletionRequest
    run_id: str | None
    step_id: str | None
    functions: list[str]
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    renderer: ChatRenderer
    client: SamplingClient
    prompt: Prompt
    history: History
    params: types.SamplingParams
    is_plain: bool
    thinking: bool
    constraint: Constraint | None
    unmet: str

    @classmethod
    async def prepare(
        cls,
        request: ChatCompletionRequest,
        source: PolicySource,
        run_id: str | None,
        step_id: str | None,
        functions: list[str],
        plain: PlainPrompt | None = None,
    ) -> Completion:
        """Render the prompt and fix the policy version. Loads the model if necessary.

        Args:
            run_id, step_id, functions: what the call belongs to, if anything.
            plain: gives the prompt's text and ids; None renders the messages with the chat template.

        Raises:
            EvsysError: the messages cannot be rendered, or the policy cannot be loaded.
        """
        check_hints(request, source.hints)
        renderer = await resolved(source.renderer)
        history = source.history or History()
        prompt = await prompt_of(request, renderer, history, source.scope_of(run_id), plain)
        client = await _client(source, run_id)
        thinking = plain is None and _ends_thinking(prompt.text, is_opened=request.opens_turn)
        constraint, unmet = await asyncio.to_thread(
            constraint_of, request, source.hints, renderer, client, thinking=thinking
        )
        defaults = source.defaults(source.recorder.kind_of(run_id))
        params = sampling_params(
            request, renderer, defaults, source.recorder.next_seed(run_id) if request.seed is None else None
        )
        source.recorder.begin_call(run_id)
        return cls(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            request=request,
            run_id=run_id,
            step_id=step_id,
            functions=functions,
            messages=with_references(request.message_dicts(), prompt.images),
            tools=request.shown_tools,
            renderer=renderer,
            client=client,
            prompt=prompt,
            history=history,
            params=params,
            is_plain=plain is not None,
            thinking=thinking,
            constraint=constraint,
            unmet=unmet,
        )

    @property
    def prompt_ids(self) -> list[int]:
        """What the policy reads, length P, ``forced_ids`` included."""
        return [*self.prompt.ids, *self.forced_ids]

    @property
    def forced_ids(self) -> list[int]:
        """The beginning of the reply that is in the prompt."""
        return [] if self.constraint is None else self.constraint.prefix

    @property
    def fingerprint(self) -> str:
        """``system_fingerprint``: the policy version that samples all of it."""
        return f"policy-{self.client.policy_version}"

    @property
    def hidden(self) -> frozenset[int]:
        """Ids that the reply's text does not show: none that its parser may have to read, as a call's."""
        parsed = not self.is_plain and bool(self.tools or self.renderer.writes_special_tokens)
        return self.renderer.hidden_ids if self.request.skip_special_tokens and not parsed else frozenset()

    def reply_text(self, index: int) -> ReplyText:
        """What turns a choice's text into its pieces."""
        reply_id, keep_stop = f"{self.id}:{index}", bool(self.request.include_stop_str_in_output)
        parser = (
            TextParser()
            if self.is_plain
            else self.renderer.create_parser(tools=self.tools, reply_id=reply_id, thinking=self.thinking)
        )
        return ReplyText(parser, stops=self.request.stops, keep_stop=keep_stop)

    async def sample(self, on_tokens: TokenCallback | None = None) -> types.SampleResponse:
        """Sample all choices.

        Raises:
            EvsysError: the engine refused or failed, or its answer has no logprobs.
        """
        response = await self.client.sample_async(
            model_input(self.prompt_ids, self.prompt.images),
            self.request.n or 1,
            self.params,
            include_prompt_logprobs=self.request.prompt_logprobs is not None,
            topk_prompt_logprobs=self.request.prompt_logprobs or 0,
            topk_sample_logprobs=self.request.top_logprobs or 0,
            on_tokens=on_tokens,
            constraint=self.constraint,
        )
        for sequence in response.sequences:
            if sequence.logprobs is None or len(sequence.logprobs) != len(sequence.tokens):
                raise EvsysError("the sampling client returned tokens without their logprobs; nothing can be recorded")
        return response

    def text_ids(self, sequence: types.SampledSequence) -> list[int]:
        """The output ids that have text."""
        return text_ids(self.renderer, sequence.tokens, sequence.stop_reason, self.request.stops)

    def choice(self, index: int, sequence: types.SampledSequence, recorder: Recorder) -> Choice:
        """Record a sampled sequence as a Call and build the client's choice from it."""
        message, finish_reason = self.record(index, sequence, recorder)
        if self.request.echoed:
            message["content"] = self.request.echoed + (message["content"] or "")
        return Choice(
            index=index,
            message=message,
            logprobs=self.logprobs(sequence.tokens, sequence.logprobs or [], getattr(sequence, "topk_logprobs", None)),
            finish_reason=finish_reason,
            token_ids=list(sequence.tokens) if self.request.return_token_ids else None,
        )

    def record(
        self, index: int, sequence: types.SampledSequence, recorder: Recorder
    ) -> tuple[dict[str, Any], FinishReason]:
        """Record a sampled sequence as a Call; the reply's message, and why it ended."""
        text = self.reply_text(index)
        ids = [*self.forced_ids, *self.text_ids(sequence)]
        whole = self.renderer.decode(ids)
        hidden = self.hidden
        shown = self.renderer.decode([each for each in ids if each not in hidden]) if hidden else whole
        reply = assemble(text.feed(shown) + text.finish())
        self._remember([*self.forced_ids, *sequence.tokens], len(ids), whole, reply.to_message())
        recorder.record(
            Call(
                call_id=self.id,
                index=index,
                run_id=self.run_id,
                step_id=self.step_id,
                functions=self.functions,
                policy_version=self.client.policy_version,
                prompt_ids=list(self.prompt_ids),
                output_ids=list(sequence.tokens),
                logprobs=list(sequence.logprobs or ()),
                stop_reason=sequence.stop_reason,
                temperature=self.params.temperature,
                top_p=self.params.top_p,
                top_k=self.params.top_k,
                messages=self.messages,
                tools=self.tools,
                reply=reply.to_message(),
                sequence=-1,
                history=self.prompt.history,
                constrained=self.constraint is not None,
                forced=[] if self.constraint is None else self.constraint.forced(sequence.tokens),
                malformed_calls=text.malformed,
                shaped=shaped_by(self.params),
                images=list(self.prompt.images),
            )
        )
        if sequence.stop_reason == "length":
            return reply.to_message(), "length"
        return reply.to_message(), "tool_calls" if reply.tool_calls else "stop"

    def _remember(self, output_ids: Sequence[int], with_text: int, text: str, reply: dict[str, Any]) -> None:
        """Let the next turn's prompt start with these ids, of which the first ``with_text`` have the ``text``."""
        seen = cut_at_stop(text, self.request.stops, keep=bool(self.request.include_stop_str_in_output))
        turn = turn_of(self.renderer, self.prompt, output_ids, with_text, seen, reply)
        self.history.add(self.prompt, turn)

    def logprobs(
        self,
        ids: Sequence[int],
        logprobs: Sequence[float],
        top: Sequence[list[tuple[int, float]] | None] | None = None,
    ) -> ChoiceLogprobs | None:
        """OpenAI's ``logprobs`` of sampled tokens, or None if the request does not ask for them."""
        return self._names.of_choice(ids, logprobs, top) if self.request.logprobs else None

    def prompt_logprobs(self, response: types.SampleResponse) -> PromptLogprobs | None:
        """vLLM's ``prompt_logprobs``, or None if the request does not ask for them."""
        if self.request.prompt_logprobs is None:
            return None
        return self._names.of_prompt(self.prompt_ids, response.prompt_logprobs or [], response.topk_prompt_logprobs)

    @property
    def _names(self) -> TokenNames:
        return TokenNames(self.renderer, by_id=bool(self.request.return_tokens_as_token_ids))

    def usage(self, sequences: Sequence[types.SampledSequence]) -> Usage:
        """Token counts over all choices."""
        completion = sum(len(sequence.tokens) for sequence in sequences)
        prompt = len(self.prompt_ids)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _ends_thinking(text: str, *, is_opened: bool) -> bool:
    """Whether a prompt ends inside a ``<think>`` block. One that the template opened may name the tag in a message."""
    return opens_thinking(text) if is_opened else text.rfind("<think>") > text.rfind("</think>")


async def _client(source: PolicySource, run_id: str | None) -> SamplingClient:
    held = source.held_client() if source.recorder.kind_of(run_id) == "rollout" else None
    client: SamplingClient = await resolved(source.sampling_client) if held is None else held
    return client


async def resolved(source: Callable[[], Any]) -> Any:
    """Call a source of the policy. A plain function may take long (loading), so it runs in a thread."""
    if inspect.iscoroutinefunction(source):
        return await source()
    value = await asyncio.to_thread(source)
    return await value if inspect.isawaitable(value) else value


def check_model(model: str, known: Sequence[str]) -> None:
    """Refuse a model that is not served here.

    Raises:
        ApiError: 404 ``model_not_found`` that names those that are.
    """
    if model not in known:
        names = ", ".join(f"`{name}`" for name in known)
        raise ApiError(
            404, f"the model `{model}` is not served here; use {names}", param="model", code="model_not_found"
        )
