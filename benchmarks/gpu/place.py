"""Where the check runs and on what: the device, and the shapes of its models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from workloads import SMALL, Shape

PEAK_FLOPS = 989e12
"""Dense bf16 of an H100 SXM or an H200, by NVIDIA's data sheets; a matrix product reaches about 790e12."""

SHAPES = {
    "0.6B": Shape(vocab=151_936, hidden=1024, inner=3072, layers=28, heads=16, kv_heads=8, head_dim=128),
    "4B": Shape(vocab=151_936, hidden=2560, inner=9728, layers=36, heads=32, kv_heads=8, head_dim=128),
}
"""Of Qwen3."""

FAMILIES = ("qwen3", "llama", "gemma3")


@dataclass(frozen=True)
class Place:
    """Attributes:
    device: "cuda" or "cpu".
    small: a rehearsal: tiny models and short sequences in place of the real shapes; its times mean nothing.
    out: the folder for files.
    """

    device: str
    small: bool
    out: Path

    def prepare(self) -> dict[str, str]:
        """Set this process up; returns what it runs on."""
        import torch
        import transformers

        torch.set_float32_matmul_precision("highest")  # no TF32: fp32 is compared as fp32
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this torch sees no GPU; --device cpu --small rehearses the check")
        name = "cpu"
        if self.device == "cuda":
            # Several models in one process have more shapes of attention than torch compiles by default.
            torch._dynamo.config.recompile_limit = 64
            name = torch.cuda.get_device_name()
        return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}

    def shape(self, title: str) -> Shape:
        """Of the model that is called "0.6B" or "4B"."""
        return replace(SMALL, divide=16) if self.small else SHAPES[title]

    def exact_shape(self, family: str) -> Shape:
        """Of the model on which numbers are compared, as small as in the rehearsal of the CPU's benchmark."""
        return replace(SMALL, family=family, divide=16 if self.small else SMALL.divide)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def restart_peak(self) -> float:
        """Count the peak anew from here; returns the bytes that are allocated now, 0 where the device counts none."""
        if self.device != "cuda":
            return 0.0
        import torch

        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())

    def peak(self) -> float:
        """Most bytes that were allocated since then, 0 where the device counts none."""
        if self.device != "cuda":
            return 0.0
        import torch

        return float(torch.cuda.max_memory_allocated())
