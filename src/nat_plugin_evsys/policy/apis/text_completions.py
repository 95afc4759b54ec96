"""OpenAI's text completions: a prompt of text or ids, no chat template. One prompt a request."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.apis.dialect import chunks_of, event_of, refuse_chat_fields
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.protocol import ChatCompletion, dumps
from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.token_ids import are_token_ids

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_ONLY_HERE = frozenset({"prompt", "suffix", "logprobs", "echo"})


class TextDialect:
    """One request of ``POST /v1/completions``.

    Args:
        body: the request's JSON.

    Raises:
        ApiError: 400 that names the field.

    Attributes:
        request: what it asks for, as a chat completion without messages of its own.
        prompt: text or token ids.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self.prompt: str | list[int] = _one_prompt(body.get("prompt"))
        if body.get("suffix"):
            raise bad_request("`suffix`: this endpoint does not offer it", param="suffix", code="unsupported_parameter")
        refuse_chat_fields(body, "prompt")
        self._echo, self._echoed = bool(body.get("echo")), ""
        top = body.get("logprobs")
        if self._echo and top is not None:
            raise bad_request(
                "`echo` with `logprobs` is not offered; send `prompt_logprobs` instead of `echo`",
                param="echo",
                code="unsupported_parameter",
            )
        # True is an int too, and no number of alternatives.
        if top is not None and (not isinstance(top, int) or isinstance(top, bool)):
            raise bad_request("`logprobs`: must be the number of alternatives", param="logprobs", code="invalid_value")
        rest = {name: value for name, value in body.items() if name not in _ONLY_HERE}
        chat = {"messages": [{"role": "user", "content": str(self.prompt)}], "max_tokens": _DEFAULT_MAX_TOKENS}
        logprobs = {} if top is None else {"logprobs": True, "top_logprobs": top}
        self.request = ChatCompletionRequest.parse({**chat, **rest, **logprobs})

    def ids(self, renderer: ChatRenderer) -> tuple[str, list[int]]:
        """The prompt's text and ids. Special tokens that its text names are such tokens."""
        if isinstance(self.prompt, str):
            text, ids = self.prompt, renderer.encode(self.prompt)
        else:
            text, ids = renderer.decode(self.prompt), self.prompt
        if self._echo:
            self._echoed = text
        return text, ids

    def answer(self, completion: ChatCompletion) -> bytes:
        """See ``Dialect``."""
        data = completion.model_dump()
        choices = [
            self._choice(choice, choice["message"]["content"] or "", choice["token_ids"]) for choice in data["choices"]
        ]
        if data["prompt_logprobs"] is not None:
            choices = [{**choice, "prompt_logprobs": data["prompt_logprobs"]} for choice in choices]
        return dumps(self._object(data) | {"choices": choices, "usage": data["usage"]})

    async def events(self, chat: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """See ``Dialect``."""
        async for chunk in chunks_of(chat):
            if "error" in chunk:
                yield event_of(chunk)
                continue
            choices = [
                self._choice(choice, choice["delta"].get("content") or "", choice.get("token_ids"), first=is_first)
                for choice in chunk["choices"]
                if (is_first := "role" in choice["delta"]) or choice["delta"] or choice["finish_reason"]
            ]
            usage = {"usage": chunk["usage"]} if "usage" in chunk else {}
            if choices or usage:
                yield event_of(self._object(chunk) | {"choices": choices} | usage)
        yield b"data: [DONE]\n\n"

    def _object(self, data: dict[str, Any]) -> dict[str, Any]:
        kept = {name: data[name] for name in ("created", "model", "system_fingerprint")}
        return {"id": "cmpl-" + data["id"].removeprefix("chatcmpl-"), "object": "text_completion", **kept}

    def _choice(
        self, choice: dict[str, Any], text: str, token_ids: list[int] | None, *, first: bool = True
    ) -> dict[str, Any]:
        echoed = self._echoed if first else ""
        made = {"index": choice["index"], "text": echoed + text, "finish_reason": choice["finish_reason"]}
        ids = {} if token_ids is None else {"token_ids": token_ids}
        return {**made, "logprobs": _logprobs(choice["logprobs"]), **ids}


def _one_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if prompt and isinstance(prompt, str):
        return prompt
    if are_token_ids(prompt):
        ids: list[int] = prompt
        return ids
    raise bad_request(
        "`prompt`: must be one text or one list of token ids, which is not empty", param="prompt", code="invalid_value"
    )


def _logprobs(logprobs: dict[str, Any] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = logprobs["content"]
    offsets, end = [], 0
    for entry in content:
        offsets.append(end)
        end += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in content],
        "token_logprobs": [entry["logprob"] for entry in content],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in content],
        "text_offset": offsets,
    }
