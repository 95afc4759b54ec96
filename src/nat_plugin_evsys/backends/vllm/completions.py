"""A sampling request in the words of vLLM's ``/v1/completions``, and the answer in Tinker's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nat_plugin_evsys.calls import StopReason
from nat_plugin_evsys.engine.sampling.request import SampleRequest
from nat_plugin_evsys.engine.sampling.result import SampledSequence, SampleResult
from nat_plugin_evsys.errors import ServiceError

_SEEDS = 2**63
_PROBES, _PROBE_TOKENS, _PROBE_SEED = 2, 24, 20


def why_not(request: SampleRequest) -> str:
    """Why vLLM would not record what a learner assumes of this request; "" if it would.

    Its logprobs are those of what it samples, so where tokens are ruled out they are not the policy's own.
    """
    reasons = {
        "images": bool(request.images),
        "a form of the reply": request.constraint is not None,
        "prompt logprobs": request.want_prompt_logprobs or request.topk_prompt > 0 or request.prompt_scores is not None,
        "top logprobs": request.topk_sample > 0,
        "min_tokens, logit_bias, min_p or a penalty": request.shaping is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def completion_body(request: SampleRequest, seed: int | None, model: str) -> dict[str, Any]:
    """The JSON of the request. Whatever ends a sequence is said: vLLM's own end of sequence is turned off."""
    return {
        **_recorded(request.prompt, model),
        "n": _distinct(request),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        **_kept(request),
        "seed": None if seed is None else seed % _SEEDS,
        "stop": list(request.stop.strings),
        "stop_token_ids": sorted(request.stop.ids),
        "include_stop_str_in_output": True,
    }


def probe_body(prompt: list[int], model: str, temperature: float, room: int) -> dict[str, Any]:
    """The JSON of a request whose samples drift is measured on, no longer than ``room`` tokens."""
    sizes = {"n": _PROBES, "max_tokens": max(1, min(_PROBE_TOKENS, room)), "seed": _PROBE_SEED}
    return {**_recorded(prompt, model), **sizes, "temperature": temperature}


def _distinct(request: SampleRequest) -> int:
    """Sequences to ask for. Greedy ones are equal, and vLLM refuses to sample more than one."""
    return 1 if request.temperature == 0 else len(request.sequences)


def _kept(request: SampleRequest) -> dict[str, float]:
    """The tokens that may be sampled. A top_p of 0, which vLLM refuses, leaves the likeliest alone."""
    if request.top_p == 0:
        return {"top_p": 1.0, "top_k": 1}
    return {"top_p": request.top_p, "top_k": max(request.top_k, 0)}


def _recorded(prompt: list[int], model: str) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "add_special_tokens": False,
        "logprobs": 0,
        "return_token_ids": True,
        "cache_salt": model,
    }


def sampled(answer: Mapping[str, Any], request: SampleRequest, policy_version: int) -> SampleResult:
    """The answer's sequences, in the order of their index.

    Raises:
        ServiceError: it lacks token ids or logprobs, or has another number of sequences.
    """
    choices = sorted(answer.get("choices", ()), key=lambda choice: int(choice["index"]))
    if len(choices) != _distinct(request):
        raise ServiceError(f"vLLM gave {len(choices)} sequences for {_distinct(request)}", category="server")
    if request.temperature == 0:
        choices = [{**choices[0], "index": index} for index in range(len(request.sequences))]
    cached = ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens")
    return SampleResult(
        sequences=[_sequence(choice, request) for choice in choices],
        prompt_cache_hit_tokens=cached or 0,
        policy_version=policy_version,
    )


def tokens_of(choice: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    """``(sampled ids, their logprobs)`` of a choice.

    Raises:
        ServiceError: it lacks one of them.
    """
    tokens = choice.get("token_ids")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not tokens or logprobs is None or len(tokens) != len(logprobs) or None in logprobs:
        raise ServiceError(
            "vLLM gave no token ids, or not a logprob of each; it must know `return_token_ids` (0.10.2 or newer)",
            category="server",
        )
    return list(tokens), list(logprobs)


def _sequence(choice: Mapping[str, Any], request: SampleRequest) -> SampledSequence:
    tokens, logprobs = tokens_of(choice)
    stop_reason: StopReason = "stop" if choice.get("finish_reason") == "stop" else "length"
    return SampledSequence(
        stop_reason=stop_reason,
        sequence_id=f"{request.ident}-{choice['index']}",
        tokens_np=np.array(tokens, dtype=np.int32),
        logprobs_np=np.array(logprobs, dtype=np.float32),
        decode=request.decode,
    )
