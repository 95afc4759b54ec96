"""What the endpoint does with each field of a chat completion request: one table.

Clients send more than a policy can follow. A field that cannot change what is sampled is ignored, as vLLM does. One
that changes the sampled distribution is honoured and recorded; `nat finetune` stops at a call whose distribution the
learner does not compute. What cannot be honoured is refused by name, unless its value is neutral. A name that the
table does not know may be a misspelt setting, so it is refused. Inside messages and tools, which clients echo with
additions of their own, unknown names are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nat_plugin_evsys.policy.api_errors import bad_request


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is refused, unless its value is null or one of ``neutral``."""

    why: str
    neutral: tuple[Any, ...] = ()


_OTHER_DISTRIBUTION = "training needs the model's own distribution, which this would change"
_NOT_OFFERED = "this endpoint does not offer it"

HONOURED = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "n",
        "stop",
        "stop_token_ids",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "max_tokens",
        "max_completion_tokens",
        "logprobs",
        "top_logprobs",
        "response_format",
        "chat_template_kwargs",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "min_p",
        "min_tokens",
        "add_generation_prompt",
        "continue_final_message",
        "echo",
        "prompt_logprobs",
        "skip_special_tokens",
        "ignore_eos",
        "include_stop_str_in_output",
    }
)
"""The fields of ``ChatCompletionRequest``."""

IGNORED = frozenset(
    {
        # OpenAI: identity, storage, caching, billing, effort.
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
        # vLLM: scheduling, caching, and how text is shown.
        "cache_salt",
        "include_reasoning",
        "priority",
        "request_id",
        "spaces_between_special_tokens",
        # Anthropic's, which gateways pass on.
        "thinking",
    }
)
"""Fields that change nothing that is sampled."""

REFUSED = {
    "length_penalty": Refused("there is no beam search", (1,)),
    "bad_words": Refused(f"is not honoured; leave it empty: {_OTHER_DISTRIBUTION}", ([],)),
    "allowed_token_ids": Refused(f"is not honoured: {_OTHER_DISTRIBUTION}"),
    "use_beam_search": Refused("only false is honoured: there is no beam search", (False,)),
    "best_of": Refused("only 1 is honoured; ask for several choices with `n`", (1,)),
    "add_special_tokens": Refused("only false is honoured: the chat template writes them", (False,)),
    "truncate_prompt_tokens": Refused("a prompt that is too long is refused, never cut"),
    "chat_template": Refused("set `chat_template` of the policy in the YAML"),
    "documents": Refused(_NOT_OFFERED, ([],)),
    "functions": Refused("is OpenAI's old form; send `tools`", ([],)),
    "function_call": Refused("is OpenAI's old form; send `tool_choice`", ("none", "auto")),
    "audio": Refused("the policy writes text only"),
    "modalities": Refused("the policy writes text only", (["text"], [])),
    "web_search_options": Refused(_NOT_OFFERED),
    "structured_outputs": Refused("send `response_format`"),
    "guided_json": Refused("send `response_format`"),
    "guided_regex": Refused(_NOT_OFFERED),
    "guided_choice": Refused(_NOT_OFFERED),
    "guided_grammar": Refused(_NOT_OFFERED),
}
"""Fields that are refused unless they are neutral, and why."""

MESSAGE_FIELDS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"})
"""What is read of a message."""

_CALL_FIELDS = frozenset({"id", "type", "index", "function"})
_NAME_AND_ARGUMENTS = frozenset({"name", "arguments"})
_TOOL_FIELDS = frozenset({"type", "function"})
_FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})
_STREAM_OPTIONS = frozenset({"include_usage"})


@dataclass(frozen=True, slots=True)
class ReadFields:
    """A request's body without what is ignored, and the paths that were, such as ``messages[].refusal``."""

    body: dict[str, Any]
    ignored: tuple[str, ...]


def read_fields(body: dict[str, Any]) -> ReadFields:
    """Apply the table to a request's body, which is not changed.

    Raises:
        ApiError: 400 that names a field that is refused, and why.
    """
    ignored: dict[str, None] = {}
    kept = {name: value for name, value in body.items() if _is_read(name, value, ignored)}
    if isinstance(options := kept.get("stream_options"), dict):
        kept["stream_options"] = _only(options, _STREAM_OPTIONS, "stream_options", ignored)
    if isinstance(kept.get("messages"), list):
        kept["messages"] = [_message(each, ignored) for each in kept["messages"]]
    if isinstance(kept.get("tools"), list):
        kept["tools"] = [_tool(each, ignored) for each in kept["tools"]]
    return ReadFields(kept, tuple(ignored))


def _is_read(name: str, value: Any, ignored: dict[str, None]) -> bool:
    if name in HONOURED:
        return True
    if name in IGNORED:
        if value is not None:
            ignored[name] = None
        return False
    rule = REFUSED.get(name)
    if rule is None:
        raise bad_request(
            f"the field `{name}` is not honoured by this endpoint; remove it", param=name, code="unknown_parameter"
        )
    if value is not None and value not in rule.neutral:
        raise bad_request(f"`{name}`: {rule.why}", param=name, code="unsupported_parameter")
    return False


def _message(message: Any, ignored: dict[str, None]) -> Any:
    if not isinstance(message, dict):
        return message  # the request's model says what is wrong with it
    for name in ("audio", "function_call"):
        if message.get(name) is not None:
            raise bad_request(
                f"`messages[].{name}` is not read by this endpoint; send text, and calls as `tool_calls`",
                param="messages",
                code="unsupported_parameter",
            )
    kept = _only(message, MESSAGE_FIELDS, "messages[]", ignored)
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [
            _entry(call, _CALL_FIELDS, _NAME_AND_ARGUMENTS, "tool_calls[]", ignored) for call in calls
        ]
    return kept


def _tool(tool: Any, ignored: dict[str, None]) -> Any:
    return _entry(tool, _TOOL_FIELDS, _FUNCTION_FIELDS, "tools[]", ignored)


def _entry(value: Any, names: Iterable[str], inner: Iterable[str], path: str, ignored: dict[str, None]) -> Any:
    if not isinstance(value, dict):
        return value
    kept = _only(value, names, path, ignored)
    if isinstance(function := kept.get("function"), dict):
        kept["function"] = _only(function, inner, f"{path}.function", ignored)
    return kept


def _only(value: dict[str, Any], names: Iterable[str], path: str, ignored: dict[str, None]) -> dict[str, Any]:
    for name, item in value.items():
        if name not in names and item not in (None, [], {}, False):
            ignored[f"{path}.{name}"] = None
    return {name: item for name, item in value.items() if name in names}
