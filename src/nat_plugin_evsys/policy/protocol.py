"""OpenAI's chat completions as this endpoint answers them: whole replies and chunks of a stream."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel

from nat_plugin_evsys.json_lines import escape_line_ends


class TopLogprob(BaseModel):
    """A token that could have been sampled. ``bytes`` are its UTF-8 bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A sampled token. There is one for each output id, the stop token included."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Log-probabilities under the distribution that was sampled."""

    content: list[TokenLogprob]
    refusal: None = None


class Usage(BaseModel):
    """Token counts; the completion's are those of all choices, stop tokens included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length", "tool_calls"]


class Choice(BaseModel):
    """One reply. ``token_ids`` (vLLM's extension) are there when ``return_token_ids`` asked for them."""

    index: int
    message: dict[str, Any]
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = None


PromptLogprobs = list[dict[str, dict[str, Any]] | None]
"""vLLM's: of each prompt token, by token id, ``logprob``, ``rank`` and ``decoded_token``; None for the first."""


class ChatCompletion(BaseModel):
    """The answer to a plain request. ``system_fingerprint`` names the policy version."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChunkChoice(BaseModel):
    """What a chunk adds to one reply."""

    index: int
    delta: dict[str, Any]
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


def to_json(model: BaseModel) -> bytes:
    """JSON with OpenAI's nulls, but without the extensions that were not asked for."""
    optional = {"token_ids", "prompt_token_ids", "prompt_logprobs"}
    optional |= {"usage"} if isinstance(model, ChatCompletionChunk) else set()
    data = model.model_dump()
    for part in [data, *data["choices"]]:
        for name in optional:
            if name in part and part[name] is None:
                del part[name]
    return dumps(data)


def dumps(value: Any) -> bytes:
    """JSON as the endpoint writes it."""
    return escape_line_ends(json.dumps(value, ensure_ascii=False, separators=(",", ":"))).encode()
