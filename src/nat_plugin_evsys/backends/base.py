"""The ``Backend`` protocol and the sampling client it hands out.

``tinker.types`` are the types. What Tinker's own clients do not have is marked *extension*.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from nat_plugin_evsys.engine.sampling.params import LARGEST_BIAS as LARGEST_BIAS
from nat_plugin_evsys.engine.sampling.params import extensions_of as extensions_of
from nat_plugin_evsys.engine.sampling.params import given_params as given_params
from nat_plugin_evsys.engine.sampling.params import shaped_by as shaped_by

if TYPE_CHECKING:
    import tinker
    import torch
    from tinker import types

    from nat_plugin_evsys.engine.model.images import ReadsImages as ReadsImages
    from nat_plugin_evsys.engine.sampling.grammars import Constraint as Constraint
    from nat_plugin_evsys.engine.sampling.grammars import Grammars as Grammars

LossCallable = Callable[
    ["list[tinker.Datum]", "list[torch.Tensor]"], "tuple[torch.Tensor, dict[str, float]] | torch.Tensor"
]
"""``(data, logprobs) -> (loss, metrics)``, or the bare loss; ``logprobs[i]`` has the shape of ``data[i]``'s
target_tokens."""

T_co = TypeVar("T_co", covariant=True)

TokenCallback = Callable[[int, list[int], list[float]], None]
"""``(sample index, new token ids, their logprobs)``, called from the sampler's thread as tokens arrive."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a good learning rate depends on: the base model's ``model_type``, and its width (``hidden_size``)."""

    model_type: str
    hidden_size: int


class Submitted(Awaitable[T_co], Protocol[T_co]):
    """An operation that has been submitted: ``await`` it, or ``await`` its ``result_async()``, as evsys's loop does."""

    async def result_async(self) -> T_co:
        """The result."""
        ...


@runtime_checkable
class SamplingClient(Protocol):
    """Samples from one fixed policy version."""

    policy_version: int

    @property
    def grammars(self) -> Grammars | None:
        """What compiles a ``constraint``; None where decoding cannot be constrained. *Extension.*"""
        ...

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
        """Sample ``num_samples`` sequences. Cancelling the awaiting task stops the sampling.

        The parameters are ``sampling_params`` (Tinker's name) or ``params`` (evsys's).

        The stop token (or the tokens of the stop string) is part of ``tokens`` and has logprobs. Logprobs are those of
        the distribution that was sampled (temperature, top_k and top_p applied). Where tokens are ruled out, by a
        ``constraint`` (*extension*, compiled by this client's ``grammars``), ``min_tokens`` or a ban, they are the
        policy's own: those of the temperature alone.

        Raises:
            PromptTooLongError: the prompt leaves no room in the context window.
            DataError: a malformed prompt or parameter, or no parameters.
        """
        ...

    async def compute_logprobs_async(self, prompt: types.ModelInput) -> list[float | None]:
        """Log-probability of each prompt token given those before it; the first is None."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A live training client plus a factory of sampling clients. Built once per run.

    Users of a backend may rely on this only; they never ask which backend it is. The ``*_async`` methods
    submit at once, in call order, and return an awaitable of the result. evsys-sdk's ``Backend`` is the part of it that
    is not marked *extension*.

    Attributes:
        checkpoint_dir: where names given to ``save_*`` are saved. *Extension.*
        policy_version: of the latest snapshot, -1 before the first. *Extension.*
    """

    checkpoint_dir: Path
    policy_version: int

    @property
    def progress(self) -> tuple[int, int] | None:
        """``(done, total)`` tokens of the current or last forward_backward; None if unknown. *Extension.*"""
        ...

    def forward_backward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> Submitted[types.ForwardBackwardOutput]:
        """Forward and backward with a named loss; gradients accumulate until ``optim_step_async``.

        All or nothing: when it fails, no gradient of ``data`` has been accumulated.
        """
        ...

    def forward_async(
        self, data: list[tinker.Datum], *, loss_fn: types.LossFnType, loss_fn_config: dict[str, Any] | None = None
    ) -> Submitted[types.ForwardBackwardOutput]:
        """Like ``forward_backward_async`` without gradients."""
        ...

    async def base_logprobs_async(self, data: list[tinker.Datum]) -> list[types.TensorData]:
        """Logprobs of each Datum's target_tokens, (N,), under the base model without the adapter. *Extension.*

        A Datum's ``temperature`` divides the logits; its other inputs play no part.
        """
        ...

    def forward_backward_custom_async(
        self, data: list[tinker.Datum], loss_fn: LossCallable
    ) -> Submitted[types.ForwardBackwardOutput]:
        """Forward and backward with a client-side Python loss over logprobs.

        ``loss_fn`` may also return the bare loss, without metrics.
        """
        ...

    def optim_step_async(self, adam: types.AdamParams) -> Submitted[types.OptimStepResponse]:
        """One AdamW step on the accumulated gradient, which it then clears."""
        ...

    def discard_gradient_async(self) -> Awaitable[None]:
        """Clear the accumulated gradient, which may be none, so that the next step does not use it. *Extension.*"""
        ...

    async def save_for_sampler(self, name: str) -> str:
        """Save the current weights for inference (a PEFT directory for the embedded engine). Returns the URI.

        The two kinds of checkpoint are stored separately, so that each has its own names.

        Raises:
            CheckpointError: the name is taken or refused.
        """
        ...

    async def save_full_state(self, name: str) -> str:
        """Save weights and optimizer state for resume. Returns the URI.

        Raises:
            CheckpointError: the name is taken or refused.
        """
        ...

    async def load_state(self, path: str, *, with_optimizer: bool = False) -> None:
        """Load weights (and optimizer state) saved by this backend. *Extension.*

        Raises:
            CheckpointError: missing, torn, or made for another base model or LoRA shape.
        """
        ...

    async def delete_checkpoint(self, path: str) -> None:
        """Delete a checkpoint saved by this backend. *Extension.*

        Raises:
            CheckpointError: there is no checkpoint at ``path``.
        """
        ...

    async def snapshot_sampling_client(self, name: str | None = None) -> SamplingClient:
        """Freeze the current weights and return a client that samples from them.

        With ``name`` the weights are also saved as by ``save_for_sampler``. Its policy version is the number of
        optimizer steps that made the weights.
        """
        ...

    async def sampling_client(self, path: str) -> SamplingClient:
        """A client that samples from a checkpoint of either kind; the adapter in training is unchanged. *Extension.*

        Its policy version is the number of optimizer steps that made the checkpoint, 0 if unknown.

        Raises:
            CheckpointError: missing, torn, or made for another base model or LoRA shape.
        """
        ...

    def take_rollout_figures(self) -> dict[str, float]:
        """What became of samples since the last call, where another engine draws them; see ``RolloutFigures.take``.

        *Extension.*
        """
        ...

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer of the base model."""
        ...

    def get_architecture(self) -> Architecture | None:
        """Of the base model; None where a service does not say. *Extension.*"""
        ...

    def get_image_reader(self) -> ReadsImages | str:
        """What reads images for the base model, or why it is given none. *Extension.*"""
        ...

    async def is_healthy(self) -> bool:
        """True when the backend answers a real (cheap) request. *Extension.*"""
        ...

    async def close(self) -> None:
        """Finish or cancel what is in flight and free the memory. *Extension.*"""
        ...
