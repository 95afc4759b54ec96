"""Results of the training calls."""

from __future__ import annotations

from typing import Any, ClassVar

from tinker import types

from nat_plugin_evsys.engine.sampling.result import FieldAccess


class ForwardBackwardOutput(FieldAccess, types.ForwardBackwardOutput):
    """Tinker's output of ``forward`` and ``forward_backward``, plus the loss where other APIs look for it. *Extension.*

    ``output["result"]`` is Weaver's dict: ``loss_fn_outputs``, and ``metrics`` with the average ``loss`` beside
    Tinker's ``name:reduction`` keys.
    """

    KEYS: ClassVar[tuple[str, ...]] = ("result", "loss_fn_output_type", "loss_fn_outputs", "metrics")

    @classmethod
    def of(cls, output: types.ForwardBackwardOutput) -> ForwardBackwardOutput:
        """The engine's output in this type."""
        return cls(output.loss_fn_output_type, output.loss_fn_outputs, output.metrics)

    @property
    def loss(self) -> float:
        """``metrics["loss:sum"]``, whose gradient is taken (Tinker's examples print it)."""
        return self.metrics["loss:sum"]

    @property
    def average_loss(self) -> float:
        """``loss:sum`` divided by the number of trained tokens, ``tokens:sum``; 0 without any."""
        tokens = self.metrics.get("tokens:sum", 0.0)
        return self.loss / tokens if tokens else 0.0

    @property
    def result(self) -> dict[str, Any]:
        """Weaver's form."""
        return {"loss_fn_outputs": self.loss_fn_outputs, "metrics": {**self.metrics, "loss": self.average_loss}}


class OptimStepOutput(FieldAccess, types.OptimStepResponse):  # type: ignore[misc] # iterates over keys, not pairs
    """Tinker's response of ``optim_step``, readable as Weaver's mapping too. *Extension.*"""

    KEYS: ClassVar[tuple[str, ...]] = ("result", "metrics")

    @classmethod
    def of(cls, response: types.OptimStepResponse) -> OptimStepOutput:
        """The engine's response in this type."""
        return cls(metrics=response.metrics)

    @property
    def result(self) -> dict[str, Any]:
        """Weaver's form."""
        return {"metrics": dict(self.metrics or {})}
