"""One adapter under training: forward_backward, forward, custom losses and optim_step, in Tinker's vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from tinker import types
from torch import Tensor

from nat_plugin_evsys.engine.gradient.custom_loss import (
    CustomLoss,
    bare_datum,
    leaf_gradient,
    surrogate_datum,
    with_weights,
)
from nat_plugin_evsys.engine.gradient.datums import check_datums, check_thresholds
from nat_plugin_evsys.engine.gradient.micro_batches import Loss
from nat_plugin_evsys.engine.gradient.optimizer import AdamW, check_adam
from nat_plugin_evsys.engine.gradient.results import build_output
from nat_plugin_evsys.engine.gradient.steps import LocalSteps, Pass, Steps
from nat_plugin_evsys.engine.gradient.steps import Progress as Progress
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.errors import DataError, NonFiniteGradientError
from nat_plugin_evsys.loss_config import resolve_loss_fn_config

if TYPE_CHECKING:
    import tinker


class TrainableModel:
    """An adapter over a shared base model, with its accumulated gradient and its optimizer.

    Several may share one ``BaseModel`` without affecting each other. Not thread-safe: one thread operates it.

    Attributes:
        base: the frozen base model.
        adapter: the trainable adapter, updated in place by ``optim_step``.
        optimizer: AdamW and its moments.
        step: optimizer steps that made the current weights.
        token_budget: most tokens computed together (padding included on the plain path); bounds memory, changes results
            only by rounding. None: what fits in free memory.
        untrained_logprobs: whether ``forward_backward`` returns the logprobs of positions that its loss does not read;
            if not, these are 0 and cost nothing. ``forward`` returns all.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: LoraAdapter,
        *,
        token_budget: int | None = None,
        path: Literal["auto", "plain"] = "auto",
        untrained_logprobs: bool = True,
        steps: Steps | None = None,
    ) -> None:
        """Put the adapter under training.

        Args:
            path: ``"plain"`` computes padded batches operation by operation: the reference for the fast path.
            steps: what computes passes; None is this process.
        """
        self.base = base
        self.adapter = adapter
        self.parameters: dict[str, Tensor] = dict(adapter.named_tensors())
        self.optimizer = AdamW(self.parameters)
        self.step = 0
        self.token_budget = token_budget
        self.untrained_logprobs = untrained_logprobs
        self._gradient: dict[str, Tensor] | None = None
        self._steps: Steps = steps or LocalSteps(base, adapter, path)

    @property
    def gradient(self) -> Mapping[str, Tensor] | None:
        """The fp32 gradient accumulated since the last step, by tensor name; None if there is none."""
        return self._gradient

    @property
    def held_bytes(self) -> int:
        """Memory that weights, moments and gradient take."""
        held = [*self.parameters.values(), *self.optimizer.state_tensors().values(), *(self._gradient or {}).values()]
        return sum(tensor.nbytes for tensor in held)

    def discard_gradient(self) -> None:
        """Clear the accumulated gradient."""
        self._gradient = None

    def forward_backward(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        progress: Progress | None = None,
    ) -> types.ForwardBackwardOutput:
        """Loss and gradient of the *sum* over Datums; the gradient is added to the accumulated one.

        All or nothing: if this raises, the accumulated gradient is unchanged.

        Returns:
            per Datum ``logprobs`` and ``elementwise_loss`` in the shape of its target_tokens; metrics as
            ``losses.summarise`` names them, plus ``entropy:mean`` (nats, over trained tokens) and what the work was:
            ``datum_tokens:sum`` (given), ``computed_tokens:sum`` (each distinct prefix once, and again where a step was
            cut), ``plain_path_tokens:sum`` (of these, in padded batches), ``micro_batches:sum``,
            ``recomputed_tokens:sum`` (of the computed ones, in layers that were computed again in the backward pass to
            save memory), ``activation_bytes:max`` (most that was kept for a backward pass),
            ``activation_predicted_bytes:max`` and ``memory_peak_bytes:max`` (of the process, so far).

        Raises:
            DataError: a Datum is malformed (before any compute).
            ConfigError: ``loss_fn_config`` is wrong (before any compute).
        """
        output, gradient = self._run(data, loss_fn, loss_fn_config, progress, backward=True)
        self._accumulate(gradient)
        return output

    def forward(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None = None,
        progress: Progress | None = None,
    ) -> types.ForwardBackwardOutput:
        """``forward_backward`` without gradient."""
        return self._run(data, loss_fn, loss_fn_config, progress, backward=False)[0]

    def base_forward(
        self, data: Sequence[tinker.Datum], progress: Progress | None = None
    ) -> types.ForwardBackwardOutput:
        """``forward`` of cross_entropy without the adapter: logprobs of the target_tokens under the base model.

        A Datum's own logprobs, advantages and so on are ignored.
        """
        return self._run(
            [bare_datum(datum) for datum in data], "cross_entropy", None, progress, backward=False, bare=True
        )[0]

    def forward_backward_custom(
        self, data: Sequence[tinker.Datum], loss_fn: CustomLoss, progress: Progress | None = None
    ) -> types.ForwardBackwardOutput:
        """Gradient of ``loss_fn(data, logprobs) -> (loss, metrics)``, exactly, by Tinker's two passes.

        First a forward pass for the logprobs (fp32 CPU leaves, shape of target_tokens), then the caller's loss and its
        gradient by them, then a cross_entropy forward_backward with ``weights = -dC/dlogprobs``. ``metrics`` holds the
        caller's, ``loss:sum`` (the caller's loss) and ``surrogate_loss:sum``.

        Raises:
            DataError: a Datum is malformed, or the loss is not differentiable by every Datum's logprobs.
        """
        surrogate = [surrogate_datum(datum, index) for index, datum in enumerate(data)]

        def half(offset: int) -> Progress | None:
            return progress and (lambda done, total: progress(offset * total + done, 2 * total))

        forward = self.forward(surrogate, "cross_entropy", progress=half(0))
        leaves = [out["logprobs"].to_torch().clone().requires_grad_() for out in forward.loss_fn_outputs]
        with torch.enable_grad():
            loss, metrics = loss_fn(list(data), leaves)
            loss.sum().backward()
        weighted = [
            with_weights(datum, leaf_gradient(leaf, index))
            for index, (datum, leaf) in enumerate(zip(surrogate, leaves, strict=True))
        ]
        output = self.forward_backward(weighted, "cross_entropy", progress=half(1))
        merged = {key: value for key, value in output.metrics.items() if key != "loss:sum"}
        merged["surrogate_loss:sum"] = output.metrics["loss:sum"]
        merged.update(metrics)
        merged["loss:sum"] = float(loss.detach().sum())
        return dataclasses.replace(output, metrics=merged)

    def optim_step(self, adam: types.AdamParams) -> types.OptimStepResponse:
        """One AdamW step on the accumulated gradient, which it then clears.

        Raises:
            ConfigError: a value of ``adam`` is out of range; the gradient stays.
            DataError: no gradient has accumulated since the last step; nothing changes.
            NonFiniteGradientError: the gradient is not finite; weights and moments stay, the gradient is cleared.
        """
        check_adam(adam)
        if self._gradient is None:
            raise DataError("optim_step refused: no gradient has accumulated; call forward_backward first")
        try:
            metrics = self.optimizer.step(self._gradient, adam)
        except NonFiniteGradientError:
            self._gradient = None
            raise
        self._gradient = None
        self.step += 1
        return types.OptimStepResponse(metrics={**metrics, "step": float(self.step)})

    def _accumulate(self, gradient: dict[str, Tensor]) -> None:
        if self._gradient is None:
            self._gradient = gradient
            return
        for name, value in gradient.items():
            self._gradient[name] += value

    def _run(
        self,
        data: Sequence[tinker.Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float | str] | None,
        progress: Progress | None,
        *,
        backward: bool,
        bare: bool = False,
    ) -> tuple[types.ForwardBackwardOutput, dict[str, Tensor]]:
        examples = check_datums(
            data,
            loss_fn,
            vocab_size=self.base.vocab_size,
            context_length=self.base.context_length,
            vision=self.base.vision,
        )
        config = resolve_loss_fn_config(loss_fn, loss_fn_config)
        check_thresholds(examples, config)
        loss = Loss(loss_fn, config, all_logprobs=self.untrained_logprobs or not backward)
        found = self._steps.run(examples, Pass(loss, backward, bare, self.token_budget), progress)
        output = build_output(found.datums, examples)
        return dataclasses.replace(output, metrics={**output.metrics, **found.metrics}), found.gradient
