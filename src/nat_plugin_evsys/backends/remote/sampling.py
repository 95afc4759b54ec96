"""Sampling from one policy version on a Tinker service."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.backends.base import TokenCallback, extensions_of, given_params
from nat_plugin_evsys.backends.remote.waiting import ServiceWatch, sdk_future
from nat_plugin_evsys.errors import DataError, PromptTooLongError, ServiceError, UnsupportedError

if TYPE_CHECKING:
    from tinker import types

    from nat_plugin_evsys.backends.base import Constraint


class TinkerSamplingClient:
    """``backends.base.SamplingClient`` over the SDK's sampling client.

    Args:
        client: the SDK's.
        policy_version: recorded with its samples.
        context_length: most tokens of prompt and sample together, if known.
    """

    def __init__(
        self, client: Any, policy_version: int, watch: ServiceWatch, context_length: int | None = None
    ) -> None:
        self.policy_version = policy_version
        self._client = client
        self._watch = watch
        self._context_length = context_length
        self._what = f"sample of policy version {policy_version}"

    @property
    def grammars(self) -> None:
        """A service's decoding cannot be constrained."""

    async def sample_async(
        self,
        prompt: types.ModelInput,
        num_samples: int = 1,
        sampling_params: types.SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        *,
        params: types.SamplingParams | None = None,
        topk_sample_logprobs: int = 0,
        on_tokens: TokenCallback | None = None,
        constraint: Constraint | None = None,
    ) -> types.SampleResponse:
        """See ``SamplingClient``. ``on_tokens`` is called once for each sequence, at the end.

        Raises:
            PromptTooLongError: the prompt leaves no room for one token.
            DataError: no sample was asked for, the prompt is empty, or there are no parameters.
            UnsupportedError: an option that the protocol or the installed SDK lacks.
            ServiceError: the service failed, refused, or gave no logprobs.
        """
        if constraint is not None:
            raise UnsupportedError("the Tinker protocol has no grammar, so a service cannot constrain what it samples")
        if num_samples < 1:
            raise DataError(f"num_samples must be at least 1, got {num_samples}")
        asked = given_params(sampling_params, params)
        plain = _plain(asked, self._room(prompt, asked.max_tokens))
        options = {"topk_sample_logprobs": topk_sample_logprobs} if topk_sample_logprobs else {}
        try:
            returned = self._client.sample(
                prompt, num_samples, plain, include_prompt_logprobs, topk_prompt_logprobs, **options
            )
        except TypeError as error:
            raise self._watch.service.readable(error, self._what, "sample") from error
        response: types.SampleResponse = await self._watch.wait(sdk_future(returned), self._what, "sample", cancel=True)
        for index, sequence in enumerate(response.sequences):
            tokens, logprobs = sequence.tokens, sequence.logprobs
            if logprobs is None or len(logprobs) != len(tokens):
                given = "no logprobs" if logprobs is None else f"{len(logprobs)} logprobs"
                raise ServiceError(
                    f"{self._what}: the service at {self._watch.service.url} gave {given} for {len(tokens)} tokens; "
                    "nothing can be trained on that",
                    category="server",
                )
            if on_tokens is not None:
                on_tokens(index, list(tokens), list(logprobs))
        return response

    async def compute_logprobs_async(self, prompt: types.ModelInput) -> list[float | None]:
        """See ``SamplingClient``. Raises what ``sample_async`` raises."""
        self._room(prompt, 1)
        returned = self._client.compute_logprobs(prompt)
        return await self._watch.wait(sdk_future(returned), "compute_logprobs", "sample", cancel=True)

    def get_tokenizer(self) -> Any:
        """The tokenizer that the SDK finds for the base model."""
        return self._client.get_tokenizer()

    def _room(self, prompt: types.ModelInput, max_tokens: int | None) -> int | None:
        """``max_tokens``, or less if the context ends first."""
        if not prompt.length:
            raise DataError("the prompt is empty; give at least one token (for instance the BOS token)")
        if self._context_length is None:
            return max_tokens
        room = self._context_length - prompt.length
        if room < 1:
            raise PromptTooLongError(prompt.length, max_tokens or 1, self._context_length)
        return room if max_tokens is None else min(room, max_tokens)


def _plain(params: types.SamplingParams, max_tokens: int | None) -> types.SamplingParams:
    """The parameters that the protocol has, with ``max_tokens``."""
    from tinker import types

    if asked := extensions_of(params):
        raise UnsupportedError(f"the Tinker protocol has no {', '.join(asked)}; leave them out")
    fields = {name: getattr(params, name) for name in types.SamplingParams.model_fields}
    # The protocol does not say how long a seed may be; SkyRL's server takes 31 bits.
    seed = None if params.seed is None else params.seed % 2**31
    return types.SamplingParams(**{**fields, "max_tokens": max_tokens, "seed": seed})
