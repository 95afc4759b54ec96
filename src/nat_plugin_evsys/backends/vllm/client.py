"""Sampling from one policy version on a vLLM server, and in this process where vLLM cannot."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.backends.base import TokenCallback, given_params
from nat_plugin_evsys.backends.vllm.api import VllmApi
from nat_plugin_evsys.backends.vllm.completions import completion_body, sampled, why_not
from nat_plugin_evsys.backends.vllm.figures import RolloutFigures
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient, Prompt
from nat_plugin_evsys.engine.sampling.request import SampleRequest
from nat_plugin_evsys.engine.sampling.result import SampleResult
from nat_plugin_evsys.errors import DataError, ServiceError

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.backends.base import Constraint, Grammars

logger = logging.getLogger(__name__)


class VllmSamplingClient:
    """``backends.base.SamplingClient`` whose adapter vLLM knows as ``model``.

    Args:
        embedded: the client of the same weights in this process. It checks requests, and answers those that vLLM
            would not record as a learner assumes, or that it fails.
        figures: told of each request and prompt.
    """

    def __init__(self, embedded: LocalSamplingClient, api: VllmApi, model: str, figures: RolloutFigures) -> None:
        self.policy_version = embedded.policy_version
        self._embedded = embedded
        self._api = api
        self._model = model
        self._figures = figures

    @property
    def grammars(self) -> Grammars | None:
        """See ``SamplingClient``; constrained requests are sampled in this process."""
        return self._embedded.grammars

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
        """See ``SamplingClient``. ``on_tokens`` is called once for each sequence that vLLM sampled, at the end."""
        asked = given_params(sampling_params, params)
        if num_samples < 1:
            raise DataError(f"num_samples must be at least 1, got {num_samples}")
        request = self._embedded.checked(
            prompt,
            num_samples,
            asked,
            prompt_logprobs=include_prompt_logprobs,
            topk_prompt=topk_prompt_logprobs,
            topk_sample=topk_sample_logprobs,
            constraint=constraint,
        )
        found = await self._by_vllm(request, asked.seed)
        if found is None:
            return await self._embedded.sample_async(
                prompt,
                num_samples,
                asked,
                include_prompt_logprobs,
                topk_prompt_logprobs,
                topk_sample_logprobs=topk_sample_logprobs,
                on_tokens=on_tokens,
                constraint=constraint,
            )
        if on_tokens is not None:
            for index, sequence in enumerate(found.sequences):
                on_tokens(index, list(sequence.tokens), list(sequence.logprobs or ()))
        return found

    async def _by_vllm(self, request: SampleRequest, seed: int | None) -> SampleResult | None:
        """The answer, or None if the request is for the embedded engine, which is counted with the reason."""
        if reason := why_not(request):
            self._figures.embedded(reason)
            return None
        try:
            answer = await self._api.complete(completion_body(request, seed, self._model))
            result = sampled(answer, request, self.policy_version)
        except ServiceError as error:
            if self._figures.embedded("vLLM failed"):
                logger.warning("rollouts: %s; such requests are sampled by the embedded engine", error)
            return None
        self._figures.sampled(request.prompt)
        return result

    async def compute_logprobs_async(self, prompt: types.ModelInput) -> list[float | None]:
        """See ``SamplingClient``; computed in this process."""
        return await self._embedded.compute_logprobs_async(prompt)

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer."""
        return self._embedded.get_tokenizer()
