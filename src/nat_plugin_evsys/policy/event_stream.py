"""Streamed completions as server-sent events, and the client at the other end of the line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nat_plugin_evsys.errors import ApiError, ClientGone, EvsysError
from nat_plugin_evsys.garbage import let_go
from nat_plugin_evsys.inbox import LoopInbox
from nat_plugin_evsys.policy.api_errors import body_of, shutting_down
from nat_plugin_evsys.policy.completions import Completion
from nat_plugin_evsys.policy.protocol import (
    ChatCompletionChunk,
    ChoiceLogprobs,
    ChunkChoice,
    FinishReason,
    Usage,
    to_json,
)
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.policy.streaming import StreamedReply
from nat_plugin_evsys.policy.tool_calls import Piece, Thought

if TYPE_CHECKING:
    from tinker import types

T = TypeVar("T")
Event = tuple[int, list[int], list[float]]

_MOST_AT_ONCE = 32
"""Tokens that are made into chunks before other requests have their turn."""
Fail = Callable[[Exception, "str | None"], ApiError]


class Peer:
    """Watches for the client's disconnect and the endpoint's shutdown while work is done for a request.

    The request's body must have been read: what is received next is the disconnect.

    Args:
        ended: called when the request is done with.
    """

    def __init__(self, receive: Receive, closing: asyncio.Event, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._gone = asyncio.create_task(_disconnect(receive))
        self._closing = asyncio.create_task(closing.wait())

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """The work's result; the work is cancelled when nobody waits for it any more.

        Raises:
            ClientGone: the client went away.
            ApiError: 503, the endpoint is closing.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._gone, self._closing}, return_when=asyncio.FIRST_COMPLETED)
            if self._gone.done():
                raise ClientGone
            if not task.done():
                raise shutting_down()
            return await task
        finally:
            await _cancel(task)

    def close(self) -> None:
        """Stop watching: the request is done with."""
        self._gone.cancel()
        self._closing.cancel()
        self._ended()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it has ended; how it ended does not matter any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # seen


class EventStream(Response):
    """Sends events until they end or the client goes away."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], peer: Peer) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type=self.media_type)
        del self.headers["content-length"]
        self._first, self._events, self._peer = first, events, peer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the response."""
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()
            self._peer.close()


async def completion_events(
    completion: Completion, peer: Peer, recorder: Recorder, fail: Fail
) -> AsyncGenerator[bytes, None]:
    """The events of a streamed completion: roles, content and tool calls as they come, ends, usage, ``[DONE]``.

    An error before the first event is raised; one after it becomes an error event, which OpenAI's clients raise.
    """
    stream = _CompletionStream(completion)
    started = False
    try:
        async with aclosing(stream.run(peer, recorder)) as chunks:
            async for data in chunks:
                yield b"data: " + data + b"\n\n"
                started = True
    except ClientGone:
        if not started:
            raise
        if not stream.record_sent(recorder):
            recorder.disconnect()
    except Exception as error:  # the boundary of a stream: sent as an event, counted and logged
        if not started:
            raise
        body = json.dumps(body_of(fail(error, completion.run_id))).encode()
        let_go(error)
        yield b"data: " + body + b"\n\n"


class _CompletionStream:
    """The chunks of one completion. All choices are sampled side by side."""

    def __init__(self, completion: Completion) -> None:
        self._completion = completion
        request = completion.request
        self._replies = [
            StreamedReply(completion.renderer, completion.reply_text(index), completion.forced_ids, completion.hidden)
            for index in range(request.n or 1)
        ]
        self._sent: list[list[float]] = [[] for _ in self._replies]  # the logprobs of the replies' ids
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        # Top logprobs are known at the end only, so such a stream comes at the end as a whole.
        self._incremental = not request.top_logprobs

    async def run(self, peer: Peer, recorder: Recorder) -> AsyncGenerator[bytes, None]:
        """The chunks; the calls are recorded before the last of them."""
        completion = self._completion
        sampling = asyncio.ensure_future(completion.sample(self._callback() if self._incremental else None))
        try:
            opened = False
            while (events := await peer.guard(self._next_events(sampling))) is not None:
                if not opened:
                    opened = True
                    for chunk in self._roles():
                        yield chunk
                for index, ids, logprobs in events:
                    self._sent[index].extend(logprobs)
                    for chunk in self._tokens(index, ids, completion.logprobs(ids, logprobs)):
                        yield chunk
            sequences = (await peer.guard(_result(sampling))).sequences
        finally:
            await _cancel(sampling)
        if not opened:
            for chunk in self._roles():
                yield chunk
        for chunk in self._ends(sequences, recorder):
            yield chunk
            await asyncio.sleep(0)  # recording a long reply takes a while: other requests have their turn between two
        if completion.request.stream_options and completion.request.stream_options.include_usage:
            yield self._chunk([], usage=completion.usage(sequences))
        yield b"[DONE]"

    def record_sent(self, recorder: Recorder) -> bool:
        """Record what was sent of the replies, for a client that has stopped reading; False if no token was.

        The policy sampled these tokens, and whoever stopped reading had seen no others, so they can be trained on.
        """
        from tinker import types

        completion = self._completion
        sent = [
            (index, types.SampledSequence("length", completion.id, _tokens_list=reply.ids, _logprobs_list=logprobs))
            for index, (reply, logprobs) in enumerate(zip(self._replies, self._sent, strict=True))
            if reply.ids
        ]
        for index, sequence in sent:
            completion.record(index, sequence, recorder)
        return bool(sent)

    def _callback(self) -> Callable[[int, list[int], list[float]], None]:
        loop = asyncio.get_running_loop()
        inbox = LoopInbox.of(loop)

        def on_tokens(index: int, ids: list[int], logprobs: list[float]) -> None:
            inbox.call(loop, self._queue.put_nowait, (index, list(ids), list(logprobs)))

        return on_tokens

    async def _next_events(self, sampling: asyncio.Future[Any]) -> list[Event] | None:
        """What has arrived, merged per choice; None when the sampling has ended and all is handed out."""
        if self._queue.empty():
            get = asyncio.ensure_future(self._queue.get())
            try:
                await asyncio.wait({get, sampling}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                get.cancel()
            if get.done() and not get.cancelled():
                return self._merge([get.result()])
            if self._queue.empty():
                return None
        return self._merge([])

    def _merge(self, events: list[Event]) -> list[Event]:
        while not self._queue.empty() and len(events) < _MOST_AT_ONCE:
            events.append(self._queue.get_nowait())
        merged: dict[int, Event] = {}
        for index, ids, logprobs in events:
            _, all_ids, all_logprobs = merged.setdefault(index, (index, [], []))
            all_ids.extend(ids)
            all_logprobs.extend(logprobs)
        return list(merged.values())

    def _roles(self) -> list[bytes]:
        prompt = self._completion.prompt_ids if self._completion.request.return_token_ids else None
        echoed = self._completion.request.echoed
        return [
            self._chunk([_choice(index, {"role": "assistant", "content": echoed})], prompt_token_ids=prompt)
            for index in range(len(self._replies))
        ]

    def _tokens(self, index: int, ids: list[int], logprobs: ChoiceLogprobs | None) -> list[bytes]:
        return self._pieces(index, self._replies[index].feed(ids), ids, logprobs)

    def _pieces(
        self, index: int, pieces: Sequence[Piece], ids: list[int], logprobs: ChoiceLogprobs | None
    ) -> list[bytes]:
        """A chunk for each piece; token ids and logprobs go with the first, or alone while text is held back."""
        request, reply = self._completion.request, self._replies[index]
        deltas: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                deltas.append({"content": piece})
            elif isinstance(piece, Thought):
                deltas.append({"reasoning_content": piece.text})
            else:
                deltas.append({"tool_calls": [{"index": reply.calls, **piece.to_openai()}]})
                reply.calls += 1
        token_ids = ids if request.return_token_ids and ids else None
        if not deltas and ids and (token_ids or logprobs):
            deltas.append({"content": ""})
        choices = [_choice(index, delta) for delta in deltas]
        if choices:
            choices[0].token_ids, choices[0].logprobs = token_ids, logprobs if ids else None
        return [self._chunk([choice]) for choice in choices]

    def _ends(self, sequences: Sequence[types.SampledSequence], recorder: Recorder) -> Iterator[bytes]:
        for index, sequence in enumerate(sequences):
            reply = self._replies[index]
            sent = len(reply.ids)
            if sequence.tokens[:sent] != reply.ids:
                raise EvsysError(
                    "the sampling client streamed different tokens from those it returned; the call is not recorded"
                )
            ids, top = sequence.tokens[sent:], getattr(sequence, "topk_logprobs", None)
            logprobs = self._completion.logprobs(
                ids, (sequence.logprobs or [])[sent:], None if top is None else top[sent:]
            )
            pieces = reply.feed(ids) + reply.finish(self._completion.text_ids(sequence))
            yield from self._pieces(index, pieces, ids, logprobs)
        for index, sequence in enumerate(sequences):
            _, finish_reason = self._completion.record(index, sequence, recorder)
            yield self._chunk([_choice(index, {}, finish_reason)])

    def _chunk(
        self, choices: list[ChunkChoice], *, usage: Usage | None = None, prompt_token_ids: list[int] | None = None
    ) -> bytes:
        completion = self._completion
        return to_json(
            ChatCompletionChunk(
                id=completion.id,
                created=completion.created,
                model=completion.request.model,
                system_fingerprint=completion.fingerprint,
                choices=choices,
                usage=usage,
                prompt_token_ids=prompt_token_ids,
            )
        )


async def _result(sampling: asyncio.Future[T]) -> T:
    return await sampling


def _choice(index: int, delta: dict[str, Any], finish_reason: FinishReason | None = None) -> ChunkChoice:
    return ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=finish_reason)
