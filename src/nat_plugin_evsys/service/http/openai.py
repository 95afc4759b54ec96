"""OpenAI's endpoint over every model of the server: base models, checkpoints, training runs and named policies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.routing import Route

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.engine.model.images import reader_or_reason
from nat_plugin_evsys.errors import ApiError, CheckpointError, ModelError
from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.chat_routes import ChatRoutes
from nat_plugin_evsys.policy.completions import PolicySource
from nat_plugin_evsys.policy.history import History
from nat_plugin_evsys.policy.recorder import Recorder
from nat_plugin_evsys.policy.sampling import SamplingDefaults
from nat_plugin_evsys.runtime.checkpoint_store import parse_path
from nat_plugin_evsys.service.http.context import ServiceContext
from nat_plugin_evsys.service.http.logs import OWNER, ROUTE
from nat_plugin_evsys.service.work.throughput import Throughput

if TYPE_CHECKING:
    from nat_plugin_evsys.engine.model.loading import BaseModel

PREFIXES = ("/v1", "/oai/api/v1")
"""OpenAI's usual place, and Tinker's own."""


class CheckpointModels:
    """``ChatModels``: a base model's name, a tinker:// path, a training run's id, or the name of a policy."""

    def __init__(self, context: ServiceContext, recorder: Recorder) -> None:
        self._context = context
        self._recorder = recorder
        self._renderers: dict[str, ChatRenderer] = {}
        self._history = History()

    def authorize(self, headers: Mapping[str, str]) -> str:
        """The owner of the request's key."""
        return self._context.keys.owner(headers)

    async def names(self, caller: str) -> list[str]:
        """Base models, named policies, and the caller's sampler checkpoints."""
        found = await asyncio.to_thread(self._context.catalog.all_checkpoints, caller)
        return [
            *(base.name for base in self._context.engine.base_models()),
            *self._context.config.policies,
            *(each.tinker_path for each in found if each.checkpoint_type == "sampler"),
        ]

    async def source(self, name: str, caller: str) -> PolicySource:
        """See ``ChatModels``. A model that loads here stays loaded for the next request."""
        return await asyncio.to_thread(self._find, name, caller)

    def _find(self, name: str, caller: str) -> PolicySource:
        target = self._context.config.policies.get(name)
        if target is not None:
            # Whoever started the server chose to serve it to everybody.
            owner = self._context.store.run_owner(parse_path(target)[0]) or caller
        else:
            target, owner = name, caller
        try:
            client, base = self._context.engine.sampling_client(target, owner)
        except (CheckpointError, ModelError) as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error
        renderer = self._renderer(base)
        defaults = SamplingDefaults(temperature=1.0, top_p=1.0, max_tokens=base.context_length)
        return PolicySource(
            lambda: renderer,
            lambda: client,
            self._recorder,
            lambda kind: defaults,
            history=self._history,
            scope=f"{base.name}\n{caller}",  # ids are a tokenizer's, and nobody reads what another's client sampled
        )

    def _renderer(self, base: BaseModel) -> ChatRenderer:
        if base.name not in self._renderers:
            try:
                images = reader_or_reason(base.vision)
                self._renderers[base.name] = ChatRenderer(base.tokenizer, split_thoughts=True, images=images)
            except ModelError as error:
                raise bad_request(
                    f"{base.name} cannot chat: its tokenizer has no chat template; sample from it with token ids",
                    param="model",
                    code="no_chat_template",
                ) from error
        return self._renderers[base.name]


class _TokenCount(Recorder):
    """Counts the sampled tokens. No run is ever open, so no calls are kept."""

    def __init__(self, count: Throughput) -> None:
        super().__init__()
        self._count = count

    def record(self, call: Call) -> Call:
        self._count.add(len(call.output_ids))
        return super().record(call)


def openai_routes(context: ServiceContext) -> list[Route]:
    """Chat completions, completions, responses, models, tokenize and generate, under both prefixes."""
    recorder = _TokenCount(context.metrics.chat_tokens)

    def note(request: Request, route: str, caller: str) -> None:
        request.scope[ROUTE], request.scope[OWNER] = route, caller or "-"

    chat = ChatRoutes(CheckpointModels(context, recorder), recorder, lambda: context.closing, note=note)
    return [route for prefix in PREFIXES for route in chat.routes(prefix)]
