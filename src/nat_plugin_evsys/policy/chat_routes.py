"""OpenAI's routes over any number of models: chat completions, completions, responses, models.

And two of vLLM's: tokenize, and generate.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from nat_plugin_evsys.calls import FUNCTIONS_HEADER, RUN_ID_HEADER, STEP_ID_HEADER
from nat_plugin_evsys.errors import ApiError, ClientGone, EvsysError, visible
from nat_plugin_evsys.garbage import let_go
from nat_plugin_evsys.policy.api_errors import (
    api_error_of,
    bad_request,
    body_of,
    headers_of,
    is_infrastructure,
    refusal_of,
)
from nat_plugin_evsys.policy.apis.dialect import ChatDialect, Dialect
from nat_plugin_evsys.policy.apis.generate import GenerateDialect
from nat_plugin_evsys.policy.apis.responses import ResponsesDialect
from nat_plugin_evsys.policy.apis.text_completions import TextDialect
from nat_plugin_evsys.policy.apis.tokenize import TokenizeRequest
from nat_plugin_evsys.policy.attribution import functions_of
from nat_plugin_evsys.policy.completions import Completion, PolicySource
from nat_plugin_evsys.policy.event_stream import EventStream, Peer, completion_events
from nat_plugin_evsys.policy.prompts import PlainPrompt
from nat_plugin_evsys.policy.protocol import ChatCompletion
from nat_plugin_evsys.policy.recorder import CallRefusal, Recorder
from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.web.json_bodies import SMALL, beside_loop, read_json

if TYPE_CHECKING:
    from tinker import types

logger = logging.getLogger(__name__)

_CHAT = replace(SMALL, bytes=8 << 20)
_IDS = replace(_CHAT, values=1_000_000)
"""Of routes whose prompt may be token ids."""

ROLLOUT = "rollout"
FUNCTIONS = "functions"
"""Names of the path parameters of a URL that carries the rollout, and the functions, which its calls belong to."""


class ChatModels(Protocol):
    """The models that requests may ask for. Called in the event loop, for each request."""

    def authorize(self, headers: Mapping[str, str]) -> str:
        """Who sends the request.

        Raises:
            ApiError, Refusal: the sender is not allowed.
        """
        ...

    async def names(self, caller: str) -> list[str]:
        """What ``GET …/models`` lists for this caller."""
        ...

    async def source(self, name: str, caller: str) -> PolicySource:
        """The model that answers a request.

        Raises:
            ApiError: 404 ``model_not_found``.
        """
        ...


class ChatRoutes:
    """The routes and what they share.

    Args:
        models: finds the model of a request.
        recorder: counts failures and keeps the calls.
        closing: gives the event that is set when the server shuts down; requests in flight are then answered 503.
        note: called with each request, its route's template and its caller, first with "" and again once it is allowed.
    """

    def __init__(
        self,
        models: ChatModels,
        recorder: Recorder,
        closing: Callable[[], asyncio.Event],
        *,
        note: Callable[[Request, str, str], None] | None = None,
    ) -> None:
        self._models = models
        self._recorder = recorder
        self._closing = closing
        self._note = note
        self._created = int(time.time())
        self._said: set[str] = set()

    def routes(self, prefix: str) -> list[Route]:
        """Starlette's routes below ``prefix``, which ends with ``/v1``; vLLM's own are beside that."""
        root = prefix.removesuffix("/v1")
        return [
            self._route("GET", f"{prefix}/models", self._list),
            self._route("GET", f"{prefix}/models/{{name:path}}", self._describe),
            self._route("POST", f"{prefix}/chat/completions", self._chat_completions),
            self._route("POST", f"{prefix}/completions", self._completions),
            self._route("POST", f"{prefix}/responses", self._responses),
            self._route("POST", f"{prefix}/tokenize", self._tokenize),
            self._route("POST", f"{root}/tokenize", self._tokenize),
            self._route("POST", f"{root}/inference/v1/generate", self._generate),
        ]

    def _route(self, method: str, path: str, handler: Callable[[Request, str], Coroutine[Any, Any, Response]]) -> Route:
        """Check the key, and turn every exception into OpenAI's error object."""

        async def guarded(request: Request) -> Response:
            caller = ""
            try:
                if self._note is not None:
                    self._note(request, path, caller)
                caller = self._models.authorize(request.headers)
                if self._note is not None:
                    self._note(request, path, caller)
                return await handler(request, caller)
            except ClientGone as gone:
                self._recorder.disconnect()
                let_go(gone)
                return Response(status_code=499)  # nobody reads it
            except Exception as error:  # noqa: BLE001 - the boundary: answered, counted and logged
                answer = error_response(self._fail(error, _run_id(request), is_call=method == "POST"))
                let_go(error)
                return answer

        return Route(path, guarded, methods=[method])

    def _fail(self, error: Exception, run_id: str | None, *, is_call: bool = True) -> ApiError:
        answer = api_error_of(error)
        if is_infrastructure(answer):
            self._recorder.fail(run_id, answer.code or "internal_error", answer.message)
            unexpected = not isinstance(error, ApiError | EvsysError)
            logger.error("policy endpoint: %s", visible(answer.message), exc_info=error if unexpected else None)
        elif is_call and self._recorder.refuse(run_id, CallRefusal(refusal_of(answer), answer.message)):
            logger.warning("policy endpoint: a request was refused (%d): %s", answer.status, visible(answer.message))
        return answer

    async def _list(self, request: Request, caller: str) -> Response:
        names = await self._models.names(caller)
        return JSONResponse({"object": "list", "data": [self._model_object(name) for name in names]})

    async def _describe(self, request: Request, caller: str) -> Response:
        name = request.path_params["name"]
        await self._models.source(name, caller)
        return JSONResponse(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "nat_plugin_evsys"}

    async def _chat_completions(self, request: Request, caller: str) -> Response:
        body, value = await read_json(request, _CHAT)
        parsed = await beside_loop(len(body), ChatCompletionRequest.parse, value)
        return await self._serve(parsed, request, caller, ChatDialect())

    async def _completions(self, request: Request, caller: str) -> Response:
        body, value = await read_json(request, _IDS)
        asked = await beside_loop(len(body), TextDialect, _object(value))
        return await self._serve(asked.request, request, caller, asked, asked.ids)

    async def _generate(self, request: Request, caller: str) -> Response:
        body, value = await read_json(request, _IDS)
        asked = await beside_loop(len(body), GenerateDialect, _object(value))
        return await self._serve(asked.request, request, caller, asked, asked.ids)

    async def _responses(self, request: Request, caller: str) -> Response:
        body, value = await read_json(request, _CHAT)
        asked = await beside_loop(len(body), ResponsesDialect, _object(value))
        return await self._serve(asked.request, request, caller, asked)

    async def _tokenize(self, request: Request, caller: str) -> Response:
        body, value = await read_json(request, _CHAT)
        asked = await beside_loop(len(body), TokenizeRequest, _object(value))
        source = await self._models.source(asked.model, caller)
        return Response(await asked.answer(source, _run_id(request)), media_type="application/json")

    async def _serve(
        self,
        parsed: ChatCompletionRequest,
        request: Request,
        caller: str,
        dialect: Dialect,
        plain: PlainPrompt | None = None,
    ) -> Response:
        peer = Peer(request.receive, self._closing(), self._recorder.receive(_run_id(request)))
        preparing = self._prepare(parsed, request, caller, plain)
        if parsed.stream:
            events = await self._stream(preparing, peer, dialect)
            self._recorder.answered_retry(_run_id(request), _retries(request))
            return events
        try:
            completion, response = await peer.guard(_sampled(preparing))
            # Thousands of tokens with their likeliest alternatives take seconds to write.
            answer = await asyncio.to_thread(self._answer, completion, response, dialect)
            self._recorder.answered_retry(_run_id(request), _retries(request))
        finally:
            peer.close()
        return Response(answer, media_type="application/json")

    def _answer(self, completion: Completion, response: types.SampleResponse, dialect: Dialect) -> bytes:
        """Record the calls and write the answer."""
        return dialect.answer(
            ChatCompletion(
                id=completion.id,
                created=completion.created,
                model=completion.request.model,
                system_fingerprint=completion.fingerprint,
                choices=[
                    completion.choice(index, sequence, self._recorder)
                    for index, sequence in enumerate(response.sequences)
                ],
                usage=completion.usage(response.sequences),
                prompt_logprobs=completion.prompt_logprobs(response),
                prompt_token_ids=completion.prompt_ids if completion.request.return_token_ids else None,
            )
        )

    def _say_what_changes_nothing(self, completion: Completion) -> None:
        """Each field once."""
        ignored, hints = completion.request.ignored, completion.request.hints if completion.unmet else ()
        for name in set(ignored) - self._said:
            logger.info("policy endpoint: `%s` changes nothing here and is ignored", name)
        for name in set(hints) - self._said:
            logger.warning("policy endpoint: `%s` is taken as a hint only: %s", name, completion.unmet)
        schemas = set() if completion.constraint is None else set(completion.constraint.ignored)
        for message in schemas - self._said:
            logger.warning("policy endpoint: a JSON schema is not followed in full: %s", message)
        self._said.update(ignored, hints, schemas)

    async def _stream(self, preparing: Coroutine[Any, Any, Completion], peer: Peer, dialect: Dialect) -> Response:
        try:
            completion = await peer.guard(preparing)
            events = dialect.events(completion_events(completion, peer, self._recorder, self._fail))
            # Up to the first event an error still has a status of its own.
            return EventStream(await anext(events), events, peer)
        except BaseException:
            peer.close()
            raise

    async def _prepare(
        self, parsed: ChatCompletionRequest, request: Request, caller: str, plain: PlainPrompt | None
    ) -> Completion:
        source = await self._models.source(parsed.model, caller)
        functions = functions_of(request.headers.get(FUNCTIONS_HEADER) or request.path_params.get(FUNCTIONS))
        step_id = request.headers.get(STEP_ID_HEADER)
        completion = await Completion.prepare(parsed, source, _run_id(request), step_id, functions, plain)
        self._say_what_changes_nothing(completion)
        return completion


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise bad_request("the body must be a JSON object", code="invalid_value")
    return value


def _run_id(request: Request) -> str | None:
    """The rollout that a call belongs to: of its context, else the one that its URL carries."""
    return request.headers.get(RUN_ID_HEADER) or request.path_params.get(ROLLOUT)


def _retries(request: Request) -> int:
    """How often the client has tried before, if it is OpenAI's."""
    given = request.headers.get("x-stainless-retry-count", "")
    return int(given) if given.isdecimal() and len(given) < 4 else 0


async def _sampled(
    preparing: Coroutine[Any, Any, Completion],
) -> tuple[Completion, types.SampleResponse]:
    completion = await preparing
    return completion, await completion.sample()


def error_response(error: ApiError) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse(body_of(error), status_code=error.status, headers=headers_of(error))
