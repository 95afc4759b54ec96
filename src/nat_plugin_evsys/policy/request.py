"""OpenAI's chat completion request as this endpoint reads it.

``request_fields`` says what becomes of every field that a client may send; this is what is read of those honoured.
Besides OpenAI's own there are vLLM's ``top_k``, ``min_p``, ``min_tokens``, ``repetition_penalty``, ``stop_token_ids``,
``chat_template_kwargs`` (``enable_thinking``), ``return_token_ids``, ``return_tokens_as_token_ids``, ``ignore_eos``,
``include_stop_str_in_output``, ``skip_special_tokens``, ``prompt_logprobs``, ``add_generation_prompt``,
``continue_final_message`` and ``echo``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from nat_plugin_evsys.backends.base import LARGEST_BIAS
from nat_plugin_evsys.errors import ApiError
from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.request_fields import read_fields
from nat_plugin_evsys.policy.token_ids import END_OF_IDS
from nat_plugin_evsys.policy.tool_forms.schemas import check_parameters

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
MAX_BIASES = 1024


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
    """One message of the history."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    tool_calls: list[RequestToolCall] | None = Field(default=None, fail_fast=True)
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class StreamOptions(_Request):
    """``include_usage``: a last chunk with the token counts."""

    include_usage: bool | None = None


class JsonSchema(_Request):
    """The schema of ``response_format``."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Request):
    """The form of the reply."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` goes with `type: json_schema`, and with no other")
        return self


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
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=END_OF_IDS)]] | None = Field(default=None, max_length=MAX_STOPS)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    min_tokens: int | None = Field(default=None, ge=0)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    logit_bias: dict[str, float] | None = Field(default=None, max_length=MAX_BIASES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: bool | None = None

    _ignored: tuple[str, ...] = PrivateAttr(default=())

    @field_validator("tools")
    @classmethod
    def _tools_are_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for tool in tools or []:
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict):
                raise ValueError("each tool must be {type: function, function: {name, description, parameters}}")
            if not isinstance(function.get("name"), str):
                raise ValueError("each tool's function must have a name")
            check_parameters(function["name"], function.get("parameters"))
        return tools

    @field_validator("logit_bias")
    @classmethod
    def _bias_of_ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit()) or not abs(value) <= LARGEST_BIAS:
                raise ValueError(
                    f"{{{token!r}: {value}}} must be a token id and a number from -{LARGEST_BIAS:g} to {LARGEST_BIAS:g}"
                )
        return bias

    @field_validator("logprobs", mode="before")
    @classmethod
    def _yes_or_no(cls, logprobs: Any) -> Any:
        """0 and 1 are vLLM's false and true too, and what Agent Lightning's proxy sends."""
        return bool(logprobs) if type(logprobs) is int and logprobs in (0, 1) else logprobs

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, stop: Any) -> Any:
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        if len(stops) > MAX_STOPS or "" in stops:
            raise ValueError(f"at most {MAX_STOPS} stop strings, none of them empty")
        return stop

    @model_validator(mode="after")
    def _fields_fit(self) -> ChatCompletionRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("`continue_final_message` goes with `add_generation_prompt: false`")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("`prompt_logprobs` goes with no `stream`")
        if self.min_tokens and self.stops:
            raise ValueError("`min_tokens` goes with no `stop`; send `stop_token_ids`")
        if self.ignore_eos and (self.stops or self.stop_token_ids or self.hints):
            raise ValueError("`ignore_eos` goes with no `stop`, no `stop_token_ids` and no form of the reply")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream: true`")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; send one of them")
        check_tool_choice(self.tool_choice, [tool["function"]["name"] for tool in self.tools or []])
        return self

    @classmethod
    def parse(cls, value: dict[str, Any]) -> ChatCompletionRequest:
        """The request in a body's JSON object.

        Raises:
            ApiError: 400 that names the field and what is wrong with it.
        """
        read = read_fields(value)
        try:
            request = cls.model_validate(read.body)
        except ValidationError as error:
            raise _bad_request(error) from error
        request._ignored = read.ignored
        return request

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields that were sent and changed nothing."""
        return self._ignored

    @property
    def hints(self) -> tuple[str, ...]:
        """What the request asks of the form of the reply, and only constrained decoding can promise."""
        asked = {
            "tool_choice": self.tool_choice not in (None, "auto", "none"),
            "parallel_tool_calls": self.parallel_tool_calls is False and bool(self.tools),
            "response_format": self.response_format is not None and self.response_format.type != "text",
            "tools[].function.strict": any(tool["function"].get("strict") for tool in self.tools or []),
        }
        return tuple(name for name, is_asked in asked.items() if is_asked)

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def opens_turn(self) -> bool:
        """Whether the reply is a turn of its own, which the chat template opens."""
        return not self.continue_final_message and self.add_generation_prompt is not False

    @property
    def echoed(self) -> str:
        """What a reply is shown after: with ``echo``, the text of a last message that is the assistant's too."""
        last = self.messages[-1]
        return last.content if self.echo and last.role == "assistant" and isinstance(last.content, str) else ""

    @property
    def shaping(self) -> dict[str, Any]:
        """What shapes the distribution, as the extensions of Tinker's sampling parameters have it."""
        names = ("min_p", "min_tokens", "frequency_penalty", "presence_penalty", "repetition_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return {**given, "logit_bias": bias} if bias else given

    @property
    def token_limit(self) -> int | None:
        """The number of tokens that may be sampled, where the request states one."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown, without ``strict``; ``tool_choice: none`` hides them."""
        return [] if self.tool_choice == "none" else [_shown(tool) for tool in self.tools or []]

    def message_dicts(self) -> list[dict[str, Any]]:
        """The messages in OpenAI form, without what is null."""
        return [message.model_dump(exclude_unset=True, exclude_none=True) for message in self.messages]


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}


def check_tool_choice(choice: Any, names: list[str]) -> None:
    """Check a ``tool_choice`` against the names of the request's tools.

    Raises:
        ValueError: it is of no known form, or chooses what is not there.
    """
    if choice in (None, "auto", "none"):
        return
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if choice != "required" and not isinstance(name, str):
        raise ValueError(
            f"`tool_choice` is {choice!r}; it must be auto, none, required or "
            "{type: function, function: {name: NAME}}"
        )
    if not names:
        raise ValueError(f"`tool_choice` is {choice!r}, but the request has no `tools`")
    if name is not None and name not in names:
        raise ValueError(f"`tool_choice` names the tool `{name}`; `tools` has {', '.join(names)}")


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
