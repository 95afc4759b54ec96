"""OpenAI's chat completions as this endpoint speaks them: request, responses, chunks.

Every request field is honoured or refused by name. Besides OpenAI's own fields there are vLLM's ``top_k``,
``repetition_penalty`` (1.0 only), ``chat_template_kwargs`` (``enable_thinking``) and ``return_token_ids``. Identifiers
that change nothing are accepted: ``user``, ``metadata``, ``store: false``, ``safety_identifier``, ``prompt_cache_key``.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nat_plugin_evsys.errors import ApiError
from nat_plugin_evsys.policy.api_errors import bad_request

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class RequestFunctionCall(_Request):
    """The function of a tool call in the history; ``arguments`` is JSON as text."""

    name: str
    arguments: str


class RequestToolCall(_Request):
    """A tool call in the history."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: RequestFunctionCall


class RequestMessage(_Request):
    """One message of the history. The fields that can only be null are those a client echoes from a reply."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[RequestToolCall] | None = Field(default=None, fail_fast=True)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = Field(default=None, fail_fast=True)


class StreamOptions(_Request):
    """``include_usage``: a last chunk with the token counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ResponseFormat(_Request):
    """Only free text; decoding is not constrained."""

    type: Literal["text"]


class ChatTemplateKwargs(_Request):
    """Variables of the chat template."""

    enable_thinking: bool | None = None


class ChatCompletionRequest(_Request):
    """The body of ``POST /v1/chat/completions``."""

    model: str
    messages: list[RequestMessage] = Field(min_length=1, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, fail_fast=True)
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    return_token_ids: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("tools")
    @classmethod
    def _tools_are_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in tools or []:
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict):
                raise ValueError("each tool must be {type: function, function: {name, description, parameters}}")
            if not isinstance(function.get("name"), str):
                raise ValueError("each tool's function must have a name")
            if unknown := set(tool) - {"type", "function"} | set(function) - {
                "name",
                "description",
                "parameters",
                "strict",
            }:
                raise ValueError(f"tool `{function['name']}` has fields that are not honoured: {sorted(unknown)}")
            if function.get("strict"):
                raise ValueError(
                    f"`strict: true` of tool `{function['name']}` is not honoured (decoding is not constrained); "
                    "remove it"
                )
        return tools

    @field_validator("tool_choice")
    @classmethod
    def _tool_choice_is_free(cls, choice: Any) -> Any:
        if choice not in (None, "auto", "none"):
            raise ValueError(f"{choice!r} is not honoured (decoding is not constrained); use auto or none")
        return choice

    @field_validator("parallel_tool_calls")
    @classmethod
    def _parallel(cls, parallel: bool | None) -> bool | None:
        if parallel is False:
            raise ValueError("false is not honoured (decoding is not constrained); remove it")
        return parallel

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if len(stops) > MAX_STOPS or "" in stops:
            raise ValueError(f"at most {MAX_STOPS} stop strings, none of them empty")
        return stop

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, penalty: float | None) -> float | None:
        if penalty:
            raise ValueError("only 0 is honoured: training needs the model's own distribution")
        return penalty

    @field_validator("repetition_penalty")
    @classmethod
    def _no_repetition_penalty(cls, penalty: float | None) -> float | None:
        if penalty not in (None, 1):
            raise ValueError("only 1.0 is honoured: training needs the model's own distribution")
        return penalty

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, bias: dict[str, Any] | None) -> dict[str, Any] | None:
        if bias:
            raise ValueError("is not honoured; leave it empty")
        return bias

    @model_validator(mode="after")
    def _fields_fit(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; send one of them")
        return self

    @classmethod
    def parse(cls, value: dict[str, Any]) -> ChatCompletionRequest:
        """The request in a body's JSON object.

        Raises:
            ApiError: 400 that names the field and what is wrong with it.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _bad_request(error) from error

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def token_limit(self) -> int | None:
        """The number of tokens that may be sampled, where the request states one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown; ``tool_choice: none`` hides them."""
        return [] if self.tool_choice == "none" else list(self.tools or [])

    def message_dicts(self) -> list[dict[str, Any]]:
        """The messages in OpenAI form, without what is null."""
        return [message.model_dump(exclude_unset=True, exclude_none=True) for message in self.messages]


def _bad_request(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    path = _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    message = message.replace("a valid list", "a valid array").replace("a valid dictionary", "a valid object")
    if first["type"] == "extra_forbidden":
        return bad_request(
            f"the field `{path}` is not honoured by this endpoint; remove it", param=path, code="unknown_parameter"
        )
    text = f"`{path}`: {message}" if path else message
    return bad_request(text, param=path or None, code="invalid_value")


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not path:
            path = part
        elif part != "str" and not part.startswith("list["):  # the names of a union's branches say nothing
            path += f".{part}"
    return path


# -- responses --------------------------------------------------------------------------------------------------------


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


class ChatCompletion(BaseModel):
    """The answer to a plain request. ``system_fingerprint`` names the policy version."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
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
    optional = {"token_ids", "prompt_token_ids"} | ({"usage"} if isinstance(model, ChatCompletionChunk) else set())
    data = model.model_dump()
    for part in [data, *data["choices"]]:
        for name in optional:
            if name in part and part[name] is None:
                del part[name]
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
