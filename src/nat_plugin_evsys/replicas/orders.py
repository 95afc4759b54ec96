"""Sampling requests on their way to a replica, and what comes back."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tinker import types

from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient
from nat_plugin_evsys.engine.sampling.request import SampleRequest, TokenCallback
from nat_plugin_evsys.engine.sampling.result import SampleResult
from nat_plugin_evsys.errors import ReplicaError


@dataclass(frozen=True)
class Tokens:
    """New tokens of one sequence of a request, from position ``start`` of its reply on."""

    index: int
    start: int
    ids: list[int]
    logprobs: list[float]


Item = Tokens | SampleResult | list[float | None]
"""What a replica sends: tokens as they come, and last the result."""


@dataclass(frozen=True)
class SampleOrder:
    """A request that gives the same samples wherever, and however often, it is run.

    Attributes:
        params: with a seed.
        options: of ``SampleRequest``, as far as they are data.
        grammar: text and ends of the constraint.
        streamed: tokens are wanted as they come.
    """

    prompt: list[int]
    num_samples: int
    params: types.SamplingParams
    options: dict[str, Any]
    grammar: tuple[str, list[int]] | None
    streamed: bool

    @classmethod
    def of(
        cls, prompt: Sequence[int], num_samples: int, params: types.SamplingParams, options: dict[str, Any]
    ) -> SampleOrder:
        """The order of a request that has been checked already."""
        options = dict(options)
        constraint, streamed = options.pop("constraint", None), options.pop("on_tokens", None) is not None
        grammar = None if constraint is None else (constraint.source, sorted(constraint.ends))
        return cls(list(prompt), num_samples, params, options, grammar, streamed)

    def submit(self, client: LocalSamplingClient, put: Callable[[Tokens], None]) -> Future[Any]:
        """Sample here. ``put`` is called from the sampler's thread."""
        options = dict(self.options)
        if self.grammar is not None and client.grammars is not None:
            options["constraint"] = client.grammars.compile(*self.grammar)
        if self.streamed:
            starts = [0] * self.num_samples

            def on_tokens(index: int, ids: list[int], logprobs: list[float]) -> None:
                put(Tokens(index, starts[index], list(ids), list(logprobs)))
                starts[index] += len(ids)

            options["on_tokens"] = on_tokens
        return client.submit(self.prompt, self.num_samples, self.params, **options)


def with_seed(params: types.SamplingParams) -> types.SamplingParams:
    """The parameters with a seed: a fresh one, if they have none."""
    return params if params.seed is not None else params.model_copy(update={"seed": secrets.randbits(63)})


@dataclass
class Delivery:
    """Hands streamed tokens on, each once, also where a killed replica's request is run again from its beginning.

    Ray numbers what a replica sends and leaves out what has arrived already; a second run may cut its tokens into
    other pieces, so that some are missing until the result brings them.
    """

    request: SampleRequest
    on_tokens: TokenCallback
    _seen: dict[int, list[int]] = field(default_factory=dict)

    def take(self, tokens: Tokens) -> None:
        """Hand on what is new and follows what was handed on."""
        seen = self._seen.setdefault(tokens.index, [])
        known = len(seen) - tokens.start
        if 0 <= known < len(tokens.ids):
            seen += tokens.ids[known:]
            self.on_tokens(tokens.index, tokens.ids[known:], tokens.logprobs[known:])

    def finish(self, result: SampleResult) -> None:
        """Hand on the rest.

        Raises:
            ReplicaError: the request was run again and gave other tokens than were handed on.
        """
        for index, sequence in enumerate(result.sequences):
            ids, seen = sequence.tokens, self._seen.get(index, [])
            if ids[: len(seen)] != seen:
                raise ReplicaError(
                    "a replica died in the middle of a streamed reply, and another run of the same request gave other "
                    "tokens by rounding; send the request again"
                )
            logprobs = sequence.logprobs or []
            self.take(Tokens(index, len(seen), ids[len(seen) :], list(logprobs[len(seen) :])))
