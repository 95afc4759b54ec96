"""TRL's own loss path: the patched language-model head and the per-token logprobs of its ``GRPOTrainer``.

TRL is no dependency of this package. It is imported from ``benchmarks/out/trl``, where this puts it beside the
libraries that are installed already:

    pip install --target benchmarks/out/trl --no-deps trl==1.16.0 datasets pyarrow dill multiprocess
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

FOLDER = Path(__file__).parents[1] / "out" / "trl"


class TrlPath:
    """``GRPOTrainer``'s computation of logprobs for one PEFT model, without gradient checkpointing."""

    def __init__(self, model: Any) -> None:
        sys.path.append(str(FOLDER))
        from trl import GRPOTrainer
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model.get_base_model(), temperature=1.0, outputs=("log_probs", "entropy"))
        self._model = model
        # Without the decorator that reports its time to TRL's callbacks.
        self._function: Any = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
        self._trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext))

    def logprobs(self, ids: Tensor, real: Tensor, completion: int) -> Tensor:
        """Of the last ``completion`` tokens of each row: [rows, completion]. Entropies are computed, as TRL does."""
        logps, _, _ = self._function(self._trainer, self._model, ids, real, completion, compute_entropy=True)
        found: Tensor = logps
        return found


def installed() -> bool:
    """Whether TRL is where this module looks for it."""
    return (FOLDER / "trl").is_dir()
