"""Samples from one fixed policy version."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from tinker import types

from nat_plugin_evsys.clients.futures import ClientFuture, ResultFuture, after, failed
from nat_plugin_evsys.clients.handles import SamplerHandle
from nat_plugin_evsys.clients.methods import answers, awaits, refuses
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.sampling.client import LocalSamplingClient, Prompt
from nat_plugin_evsys.engine.sampling.grammars import Constraint, Grammars
from nat_plugin_evsys.engine.sampling.params import given_params
from nat_plugin_evsys.engine.sampling.request import TokenCallback
from nat_plugin_evsys.engine.sampling.result import SampleResult
from nat_plugin_evsys.errors import DataError, EvsysError
from nat_plugin_evsys.runtime.arguments import check_api_key, check_int

T = TypeVar("T")

SERVICE = "nat_plugin_evsys.clients.service"
"""Stands on this module, and so is imported only when a handle is opened."""


class SamplingHost(Protocol):
    """What a SamplingClient needs from the ServiceClient that made it."""

    def handle_of(self, base_model: str, model_path: str | None) -> SamplerHandle:
        """How another process opens the same weights."""


class Weights:
    """What a SamplingClient samples from.

    Args:
        engine: the engine's client for the weights.
        path: where they are saved, or None.
        save: saves weights that are not saved, and returns their path.
    """

    def __init__(
        self, engine: LocalSamplingClient, path: str | None, save: Callable[[LocalSamplingClient], str] | None = None
    ) -> None:
        self.engine = engine
        self.path = path
        self._save = save
        self._lock = threading.Lock()

    def saved(self) -> str | None:
        """The path of the weights, which are saved now if they were not; None for the bare base model."""
        with self._lock:
            if self.path is None and self._save is not None:
                self.path = self._save(self.engine)
            return self.path


class SharedWeights:
    """The weights that all inflight sampling clients of a training client sample from; a publication replaces them."""

    def __init__(self, weights: Weights) -> None:
        self.current = weights


class SamplingClient:
    """Tinker's SamplingClient over the engine in this process. Get one from a ServiceClient or a TrainingClient.

    It never waits for a training operation, and every result says which ``policy_version`` it ran. Safe to use from
    several threads and event loops at once.

    It can be pickled: the copy, in this process or another, samples from the same weights. Weights that were only in
    memory are saved for this, and can be opened for a day.

    Attributes:
        model_path: the checkpoint that it was created from, or None.
    """

    def __init__(self, weights: Weights | SharedWeights, base: BaseModel, host: SamplingHost) -> None:
        self._shared = weights if isinstance(weights, SharedWeights) else SharedWeights(weights)
        self.model_path = self._shared.current.path
        self._base = base
        self._host = host
        self._tokenizer: Any = None
        self._tokenizer_lock = threading.Lock()

    @property
    def policy_version(self) -> int:
        """Optimizer steps that made the weights; -1 is the bare base model. *Extension* (Loops)."""
        return self._engine.policy_version

    @property
    def grammars(self) -> Grammars | None:
        """What compiles a ``constraint``; None if the base model has no tokenizer. *Extension.*"""
        return self._engine.grammars

    @property
    def _engine(self) -> LocalSamplingClient:
        return self._shared.current.engine

    def sample(
        self,
        prompt: Prompt,
        num_samples: int = 1,
        sampling_params: types.SamplingParams | None = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: types.TensorData | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
        *,
        params: types.SamplingParams | None = None,
        on_tokens: TokenCallback | None = None,
        constraint: Constraint | None = None,
        wait: bool = False,
    ) -> ResultFuture[SampleResult]:
        """Sample ``num_samples`` sequences after ``prompt``.

        The result is a ``types.SampleResult``: Tinker's SampleResponse with ``policy_version``, whose sequences also
        have their ``text``. It, and the future, may be read like dicts (Weaver): ``future["sequences"][0]["tokens"]``.

        Args:
            prompt: token ids, as a ModelInput or a list.
            num_samples: sequences, at least 1.
            sampling_params: Tinker's, or ``nat_plugin_evsys.types.SamplingParams`` for ``repetition_penalty``. Logprobs
                are those of the distribution sampled; ``engine.sampling.decoding`` states the order of its steps.
            include_prompt_logprobs: give each prompt token's log-probability at temperature 1; None for the first.
            topk_prompt_logprobs: and those of the k likeliest tokens there.
            topk_sample_logprobs: the k likeliest tokens of each sampled position.
            target_prompt_logprobs: token ids to score at each prompt position, int64 (P - 1, K), -1 for none; row i is
                about position i + 1. The result has the same layout.
            prompt_alt_tokens_k: tokens to draw at each prompt position, at the request's temperature; their logprobs
                are those of temperature 1, as all of the prompt's.
            prompt_logprobs_last_n: give only the last n prompt tokens' logprobs.
            params: evsys's name for sampling_params. *Extension.*
            on_tokens: called from the sampler's thread as tokens arrive. *Extension.*
            constraint: a grammar that the samples follow, compiled by ``grammars``. *Extension.*
            wait: return only when it is done, raising its error. *Extension* (Weaver).

        Raises, through the future:
            DataError: a malformed prompt or parameter.
            PromptTooLongError: the prompt leaves no room for a token.
            ModelError: the model failed, or gave logits that are not finite.
            UnsupportedError: a refused option.
            EngineClosedError: the ServiceClient has been closed.
        """
        try:
            given = given_params(sampling_params, params)
            check_int("num_samples", num_samples, least=1, error=DataError)
            check_int("topk_prompt_logprobs", topk_prompt_logprobs, least=0, error=DataError)
            check_int("topk_sample_logprobs", topk_sample_logprobs, least=0, error=DataError)
            _check_last_n(prompt_logprobs_last_n)
        except EvsysError as error:
            return after(failed(ResultFuture(), error), wait)
        future = self._engine.sample(
            prompt,
            num_samples,
            given.model_copy(),
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            on_tokens=on_tokens,
            constraint=constraint,
        )
        return after(ResultFuture(self._hosted(future)), wait)

    sample_async = awaits(sample)

    def compute_logprobs(
        self, prompt: Prompt, prompt_logprobs_last_n: int | None = None, *, wait: bool = False
    ) -> ResultFuture[list[float | None]]:
        """Log-probability (temperature 1) of each prompt token given those before it; None for the first.

        With ``prompt_logprobs_last_n``, None for all but the last n. Raises through the future what ``sample`` does.
        """
        try:
            _check_last_n(prompt_logprobs_last_n)
        except EvsysError as error:
            return after(failed(ResultFuture(), error), wait)
        future = self._engine.compute_logprobs(prompt, prompt_logprobs_last_n)
        return after(ResultFuture(self._hosted(future)), wait)

    compute_logprobs_async = awaits(compute_logprobs)

    def _hosted(self, future: Future[T]) -> Future[T]:
        """The future of a request, which keeps the ServiceClient, and so the sampler, until it is done."""
        kept = [self._host]
        future.add_done_callback(lambda _: kept.clear())
        return future

    def get_tokenizer(self) -> Any:
        """The base model's Hugging Face tokenizer: a copy, so that its settings are this client's own."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = copy.deepcopy(self._base.tokenizer)
            return self._tokenizer

    def get_base_model(self) -> str:
        """The base model's name, as the user typed it."""
        return self._base.name

    get_base_model_async = answers(get_base_model)

    def get_sampler_handle(self) -> str:
        """The sampler as text; ``SamplingClient.from_sampler_handle`` opens it, in any process of this machine.

        Raises:
            CheckpointError: weights that were only in memory could not be saved.
        """
        return self._host.handle_of(self._base.name, self._shared.current.saved()).encode()

    @staticmethod
    def from_sampler_handle(handle: str, *, api_key: str | None = None) -> SamplingClient:
        """A client of the sampler behind ``handle``. Loads the base model unless this process has it.

        Raises:
            ConfigError: it is not a handle.
            CheckpointError: the weights are gone or have expired.
            ModelError: the base model cannot be loaded.
        """
        check_api_key(api_key)
        opened: SamplingClient = importlib.import_module(SERVICE).open_sampler(SamplerHandle.decode(handle))
        return opened

    def __reduce__(self) -> tuple[Callable[[str], SamplingClient], tuple[str]]:
        return SamplingClient.from_sampler_handle, (self.get_sampler_handle(),)

    create = staticmethod(refuses("SamplingClient", "create", "use ServiceClient.create_sampling_client"))
    get_telemetry = refuses("SamplingClient", "get_telemetry", "nothing is reported to anyone")
    on_queue_state_change = refuses("SamplingClient", "on_queue_state_change", "there is no server queue to observe")


class SamplingClientFuture(ClientFuture[SamplingClient]):
    """A future of a SamplingClient that may be used as one."""

    KIND = SamplingClient


def _check_last_n(last_n: Any) -> None:
    if last_n is not None:
        check_int("prompt_logprobs_last_n", last_n, least=1, error=DataError)
