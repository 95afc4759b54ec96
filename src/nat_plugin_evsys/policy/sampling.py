"""How a request is sampled: its parameters, and the grammar of the form that it asks for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nat_plugin_evsys.errors import DataError, UnsupportedError
from nat_plugin_evsys.policy.api_errors import bad_request
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.request import ChatCompletionRequest

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.backends.base import Constraint, SamplingClient
    from nat_plugin_evsys.config.policy import HintMode


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Sampling settings of requests that do not set them."""

    temperature: float
    top_p: float
    max_tokens: int


def sampling_params(
    request: ChatCompletionRequest, renderer: ChatRenderer, defaults: SamplingDefaults, seed: int | None
) -> types.SamplingParams:
    """The sampling parameters of a request: its own values, then the policy's defaults and the run's seed."""
    from nat_plugin_evsys.backends.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=request.token_limit if request.token_limit is not None else defaults.max_tokens,
        seed=request.seed if request.seed is not None else seed,
        stop=_stop(request, renderer),
        temperature=request.temperature if request.temperature is not None else defaults.temperature,
        top_k=request.top_k or -1,
        top_p=request.top_p if request.top_p is not None else defaults.top_p,
        **request.shaping,
    )


def _stop(request: ChatCompletionRequest, renderer: ChatRenderer) -> list[str] | list[int] | None:
    """Tinker takes strings or ids, not both. EOS ends a sequence in either case, unless the list is empty.

    Beside strings, ids become the texts of their tokens. Only a control token's text is written by no other tokens.
    """
    if request.ignore_eos:
        return []
    ids = [*dict.fromkeys([*renderer.stop_token_ids, *(request.stop_token_ids or [])])]
    if not request.stops:
        return ids or None
    if any(not renderer.is_control(token_id) for token_id in request.stop_token_ids or ()):
        raise bad_request(
            "`stop_token_ids` beside `stop` must be ids of control tokens; send one of the two",
            param="stop_token_ids",
            code="invalid_value",
        )
    eos = renderer.tokenizer.eos_token_id
    return [*request.stops, *(renderer.decode([token_id]) for token_id in ids if token_id != eos)]


def check_hints(request: ChatCompletionRequest, mode: HintMode) -> None:
    """Refuse a form of the reply where the policy's ``hints`` refuses it.

    Raises:
        ApiError: 400 that names the fields.
    """
    if mode == "refuse" and request.hints:
        asked = ", ".join(f"`{name}`" for name in request.hints)
        raise bad_request(
            f"{asked}: not honoured, because `hints: refuse` of the policy turns constrained decoding off; remove it, "
            "or set `hints: honour` or `ignore`",
            param=request.hints[0],
            code="unsupported_parameter",
        )


def constraint_of(
    request: ChatCompletionRequest, mode: HintMode, renderer: ChatRenderer, client: SamplingClient, *, thinking: bool
) -> tuple[Constraint | None, str]:
    """The grammar of the form that a request asks for, or why there is none.

    Args:
        thinking: whether the prompt ends inside a ``<think>`` block.

    Raises:
        ApiError: 400, the form cannot be compiled, or the model's form of calls cannot write one that is asked for.
    """
    if not request.hints:
        return None, ""
    if mode == "ignore":
        return None, "`hints: ignore` of the policy turns constrained decoding off"
    if client.grammars is None:
        return None, "the policy is sampled by a service, which cannot constrain decoding"
    try:
        grammar = renderer.reply_forms.grammar(request, thinking=thinking)
        if grammar is None:
            return None, "how this model writes tool calls is not known"
        ends = renderer.stop_token_ids if grammar.ends is None else grammar.ends
        constraint = client.grammars.compile(grammar.text, ends)
        return replace(constraint, ignored=[*grammar.unheld, *constraint.ignored]), ""
    except UnsupportedError as error:
        return None, str(error)
    except DataError as error:
        raise bad_request(f"`{request.hints[0]}`: {error}", param=request.hints[0], code="invalid_value") from error
