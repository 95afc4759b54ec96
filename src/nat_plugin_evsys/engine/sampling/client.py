"""The client of one policy version: Tinker's sampling calls, as futures and as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from tinker import types

from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.engine.sampling.grammars import Constraint, Grammars
from nat_plugin_evsys.engine.sampling.params import given_params
from nat_plugin_evsys.engine.sampling.policies import SamplingPolicy
from nat_plugin_evsys.engine.sampling.request import Limits, SampleRequest, TokenCallback
from nat_plugin_evsys.engine.sampling.result import SampleResult
from nat_plugin_evsys.errors import DataError, EvsysError

Prompt = types.ModelInput | Sequence[int]


class RequestQueue(Protocol):
    """What a client needs from the ``Sampler``."""

    limits: Limits
    tokenizer: Any
    grammars: Grammars | None

    def submit(self, policy: SamplingPolicy, request: SampleRequest) -> None:
        """Queue a request."""
        ...


class LocalSamplingClient:
    """Samples from one fixed policy version (``backends.base.SamplingClient``), plus Tinker's calls that give a Future.

    Cancelling a Future, or the task that awaits an ``_async`` call, ends the request at the next decode step.
    """

    def __init__(self, engine: RequestQueue, policy: SamplingPolicy) -> None:
        self._engine = engine
        self._policy = policy
        self.policy_version = policy.version

    @property
    def policy_ident(self) -> int:
        """Of its weights, in its sampler. *Extension.*"""
        return self._policy.ident

    @property
    def grammars(self) -> Grammars | None:
        """What compiles a ``constraint``; None if the base model has no tokenizer. *Extension.*"""
        return self._engine.grammars

    @property
    def adapter(self) -> LoraAdapter | None:
        """The frozen weights; None is the bare base model."""
        return self._policy.adapter

    def sample(
        self,
        prompt: Prompt,
        num_samples: int,
        sampling_params: types.SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        topk_sample_logprobs: int = 0,
        prompt_logprobs_last_n: int | None = None,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        on_tokens: TokenCallback | None = None,
        constraint: Constraint | None = None,
    ) -> Future[SampleResult]:
        """Sample ``num_samples`` sequences after ``prompt``.

        Logprobs are those of the distribution that was sampled (``engine.sampling.decoding`` states the order of
        temperature, top_k and top_p); for temperature 0 they are those of temperature 1. Prompt logprobs always have
        temperature 1.
        The token that ends a sequence, or those of its stop string, are in ``tokens``. ``stop=None`` stops at EOS,
        ``stop=[]`` at nothing, any other at EOS too. ``max_tokens`` is cut to the room in the context.
        The same request and seed draw with the same random numbers, whatever else is being decoded; ``seed=None`` draws
        a fresh one. What else is being decoded changes logprobs in their last digits, so that a token may change too:
        only ``deterministic`` rules that out.
        With a ``constraint`` (*extension*) tokens are drawn from what its grammar allows, and the logprobs are those of
        the distribution without it.

        Raises, through the future:
            PromptTooLongError: the prompt leaves no room for one token.
            DataError: a malformed prompt or parameter.
            ModelError: the model failed or gave logits that are not finite.
            EngineClosedError: the sampler is closed.
        """
        if num_samples < 1:
            return _failed(DataError(f"num_samples must be at least 1, got {num_samples}"))
        return self.submit(
            prompt,
            num_samples,
            sampling_params,
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt=topk_prompt_logprobs,
            topk_sample=topk_sample_logprobs,
            prompt_last_n=prompt_logprobs_last_n,
            prompt_targets=target_prompt_logprobs,
            prompt_draws=prompt_alt_tokens_k,
            on_tokens=on_tokens,
            constraint=constraint,
        )

    async def sample_async(
        self,
        prompt: Prompt,
        num_samples: int = 1,
        sampling_params: types.SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        params: types.SamplingParams | None = None,
        topk_sample_logprobs: int = 0,
        on_tokens: TokenCallback | None = None,
        constraint: Constraint | None = None,
    ) -> SampleResult:
        """Like ``sample``, with ``params`` as evsys's name for the parameters; raises what its future raises."""
        future = self.sample(
            prompt,
            num_samples,
            given_params(sampling_params, params),
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            on_tokens=on_tokens,
            constraint=constraint,
        )
        return await asyncio.wrap_future(future)

    def compute_logprobs(self, prompt: Prompt, prompt_logprobs_last_n: int | None = None) -> Future[list[float | None]]:
        """Log-probability (temperature 1) of each prompt token given those before it; None for the first.

        With ``prompt_logprobs_last_n``, None for all but the last n.

        Raises, through the future:
            PromptTooLongError: the prompt is longer than the context.
            DataError: a malformed prompt.
        """
        params = types.SamplingParams()
        return self.submit(prompt, 0, params, prompt_logprobs=True, prompt_last_n=prompt_logprobs_last_n)

    async def compute_logprobs_async(self, prompt: Prompt) -> list[float | None]:
        """Like ``compute_logprobs``; raises what its future raises."""
        return await asyncio.wrap_future(self.compute_logprobs(prompt))

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer."""
        return self._engine.tokenizer

    def submit(self, prompt: Prompt, num_samples: int, params: types.SamplingParams, **options: Any) -> Future[Any]:
        """Submit a request, with ``options`` as ``SampleRequest`` names them; errors come through the future."""
        try:
            request = self.checked(prompt, num_samples, params, **options)
        except EvsysError as exc:
            return _failed(exc)
        self._engine.submit(self._policy, request)
        return request.future

    def checked(self, prompt: Prompt, num_samples: int, params: types.SamplingParams, **options: Any) -> SampleRequest:
        """The request as ``submit`` would send it. Raises what ``SampleRequest`` does. *Extension.*"""
        return SampleRequest(prompt, num_samples, params, self._engine.limits, self._engine.tokenizer, **options)


def _failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
