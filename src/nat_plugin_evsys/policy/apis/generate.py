"""vLLM's ``POST /inference/v1/generate``: token ids in, token ids and their logprobs out; no text, no chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, NoReturn

from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.apis.dialect import refuse_chat_fields
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.protocol import ChatCompletion, dumps
from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.token_ids import are_token_ids

_DEFAULT_MAX_TOKENS = 16  # vLLM's
_REFUSED = {
    "features": "the policy reads text tokens only",
    "content_parts": "the policy reads text tokens only",
    "kv_transfer_params": "this endpoint does not offer it",
    "stream": "the answer comes whole; leave it out",
}
_CHANGE_NOTHING = frozenset({"detokenize", "output_kind", "routed_experts_prompt_start"})
"""Sampling parameters of vLLM's that say only what else is answered."""


class GenerateDialect:
    """One request, which clients that render the chat template themselves send (`renderers`, verifiers, prime-rl).

    Args:
        body: the request's JSON: ``model``, ``token_ids`` and vLLM's ``sampling_params``.

    Raises:
        ApiError: 400 that names the field.

    Attributes:
        request: what it asks for, as a chat completion without messages of its own.
        token_ids: the prompt, length P.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        rest = dict(body)
        self.token_ids = _token_ids(rest.pop("token_ids", None))
        for name, why in _REFUSED.items():
            if rest.pop(name, None):
                raise bad_request(f"`{name}`: {why}", param=name, code="unsupported_parameter")
        given = rest.pop("sampling_params", None) or {}
        if not isinstance(given, dict):
            raise bad_request("`sampling_params`: must be a JSON object", param="sampling_params", code="invalid_value")
        refuse_chat_fields({**given, **rest}, "token_ids")
        params = {name: value for name, value in given.items() if name not in _CHANGE_NOTHING}
        top = params.pop("logprobs", None) or 0
        self.request = ChatCompletionRequest.parse(
            {
                "messages": [{"role": "user", "content": str(self.token_ids)}],
                "max_tokens": _DEFAULT_MAX_TOKENS,
                **params,
                **rest,
                "logprobs": True,
                "top_logprobs": top,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
            }
        )

    def ids(self, renderer: ChatRenderer) -> tuple[str, list[int]]:
        """The prompt's text and ids."""
        return renderer.decode(self.token_ids), self.token_ids

    def answer(self, completion: ChatCompletion) -> bytes:
        """See ``Dialect``."""
        data = completion.model_dump()
        kept = ("index", "token_ids", "logprobs")
        choices = [
            {name: choice[name] for name in kept}
            | {"finish_reason": "length" if choice["finish_reason"] == "length" else "stop"}
            for choice in data["choices"]
        ]
        named = {name: data[name] for name in ("model", "system_fingerprint", "prompt_logprobs", "usage")}
        return dumps({"request_id": data["id"], "choices": choices, **named})

    def events(self, chat: AsyncGenerator[bytes, None]) -> NoReturn:
        """See ``Dialect``; ``stream`` is refused."""
        raise AssertionError("a request that streams was not refused")


def _token_ids(value: Any) -> list[int]:
    if are_token_ids(value):
        ids: list[int] = value
        return ids
    raise bad_request(
        "`token_ids`: must be a list of token ids, which is not empty", param="token_ids", code="invalid_value"
    )
