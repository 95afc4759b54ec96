"""Chooses how a model is sampled without the fast path: only in a way that gave what plain passes give."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.engine.sampling.budgets import KVBudget
from nat_plugin_evsys.engine.sampling.exact_runner import ExactDecoder, ExactRunner
from nat_plugin_evsys.engine.sampling.kv_cache import SlotStore
from nat_plugin_evsys.engine.sampling.model_runner import ModelRunner
from nat_plugin_evsys.engine.sampling.prefix_cache import PrefixCache
from nat_plugin_evsys.engine.sampling.row_decoder import Context, RowDecoder
from nat_plugin_evsys.engine.sampling.slot_decoder import SlotDecoder
from nat_plugin_evsys.errors import ModelError, one_line

logger = logging.getLogger(__name__)

Runner = ModelRunner | ExactRunner

_CONTEXTS = ((9, 1), (3, 2))
"""Tokens and rows of the contexts that begin together; another one joins them later."""
_LATE, _STEPS = 5, 3
_ROOM = 16
_KNOWN_WINDOWS = frozenset({"sliding_window", "max_window_layers", "use_sliding_window"})
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.15
"""A wrong mask, position or state is off by more; eight bits lose a few percent in any order of the sums."""


def trusted_runner(base: BaseModel) -> tuple[Runner, str]:
    """``(how to run the model, "")``, or ``(a slower way, why the usual one cannot be used)``, which is also logged.

    Raises:
        ModelError: no way gives what a plain pass over the whole sequence gives.
    """
    if base not in _VERDICTS:
        _VERDICTS[base] = _find_out(base)
        if _VERDICTS[base][1]:
            logger.warning("%s is sampled %s", base.name, _VERDICTS[base][1])
    way, reason = _VERDICTS[base]
    return _WAYS[way](base), reason


def decoding_gap(decoder: RowDecoder, base: BaseModel) -> float:
    """Distance of a decoder's logits from those of plain passes, as a share of their norm; the worst row counts.

    Rows of unequal length decode a few given tokens with the bare base model, two of them from one context, one joining
    late. A plain pass is over one whole sequence, without padding or a cache.
    """
    generator = torch.Generator().manual_seed(0)
    rows: list[list[int]] = []
    found: list[tuple[list[int], int, Tensor]] = []
    with torch.inference_mode():
        for length, count in _CONTEXTS:
            decoder.join(Context(_draw(base, length + _own_window(base), generator), count))
        for step in range(_STEPS):
            if step == _STEPS // 2:
                decoder.join(Context(_draw(base, _LATE, generator)))
            for row in rows:
                row += _draw(base, 1, generator)
            logits, read = decoder.step([row[-1] for row in rows])
            found += [(row, len(row), of_row.clone()) for row, of_row in zip(rows, logits, strict=False)]
            for context, of_context in zip(read, logits[len(rows) :], strict=True):
                new = [list(context.tokens) for _ in range(context.rows)]
                found.append((new[0], len(new[0]), of_context.clone()))
                rows += new
        expected = {id(row): _plain(base, row) for row in rows}
        gaps = [distance(logits, expected[id(row)][length - 1]) for row, length, logits in found]
        decoder.close()
    return max(gaps)


def allowed_gap(base: BaseModel) -> float:
    """The largest ``decoding_gap`` that rounding explains."""
    return _TOLERANCE.get(base.dtype, _HALF_TOLERANCE)


def _find_out(base: BaseModel) -> tuple[str, str]:
    """The first way that can be trusted, and what is wrong with those before it."""
    reasons: list[str] = []
    for name, make in _WAYS.items():
        reason = mismatch(base, partial(_gap_of, base, make))
        if not reason:
            return name, f"{name}, because {'; '.join(reasons)}" if reasons else ""
        reasons.append(f"in {name} {reason}" if name == _USUAL else f"{name} {reason}")
    raise ModelError(
        f"cannot sample from base_model {base.name!r} ({type(base.model).__name__}): {'; '.join(reasons)}; "
        "choose another base_model"
    )


def _gap_of(base: BaseModel, make: Callable[[BaseModel], Runner]) -> float:
    return decoding_gap(_decoder(make(base)), base)


def mismatch(base: BaseModel, measure: Callable[[], float]) -> str:
    """Why a way of decoding cannot be trusted, "" if it can. ``measure`` gives its gap, and may run any model code."""
    try:
        gap = measure()
    except ModelError as exc:
        return str(exc)
    except Exception as exc:  # noqa: BLE001 - boundary: any model code may run here, and another way may need none of it
        return f"it fails: {one_line(exc)}"
    if gap <= allowed_gap(base):
        return ""
    return f"its logits are off by {gap:.1e} of their norm"


def _decoder(runner: Runner) -> RowDecoder:
    if isinstance(runner, ExactRunner):
        return ExactDecoder(runner, None)
    return SlotDecoder(runner, PrefixCache(0), 0, None, kv=KVBudget(1 << 40), store=SlotStore(runner.layout))


def _own_window(base: BaseModel) -> int:
    """Tokens up to which a layer's own mask may let a difference go unseen; 0 where masks are as elsewhere.

    ``sliding_window`` is what ``AttentionMasks`` knows. Some models keep a window of another name to themselves.
    """
    config = base.model.config.get_text_config().to_dict()
    windows = [v for k, v in config.items() if "window" in k and k not in _KNOWN_WINDOWS and isinstance(v, int)]
    return max((w for w in windows if w + _ROOM < base.context_length), default=0)


def _draw(base: BaseModel, count: int, generator: torch.Generator) -> list[int]:
    drawn: list[int] = torch.randint(base.vocab_size, (count,), generator=generator).tolist()
    return drawn


def _plain(base: BaseModel, tokens: list[int]) -> Tensor:
    """Logits [T, V]."""
    ids = torch.tensor([tokens], device=base.device)
    with applied(None):
        logits: Tensor = base.model(input_ids=ids, use_cache=False).logits[0]
    return logits.float()


def distance(found: Tensor, expected: Tensor) -> float:
    """Of two tensors of logits, as a share of the norm of ``expected``; infinite where one is not finite."""
    # A model may give the same logits to all tokens: equal zeros are no distance.
    norm = expected.norm().clamp_min(torch.finfo(expected.dtype).tiny)
    gap = float((found.float() - expected).norm() / norm)
    return gap if gap == gap else float("inf")


_USUAL = "padded batches"
_WAYS: dict[str, Callable[[BaseModel], Runner]] = {
    _USUAL: ModelRunner,
    "one sequence at a time with transformers' own cache": lambda base: ExactRunner(base, cached=True),
    "one sequence at a time without a cache": lambda base: ExactRunner(base, cached=False),
}
# Names alone: a runner holds its base model, which would then stay alive as its own key.
_VERDICTS: WeakKeyDictionary[BaseModel, tuple[str, str]] = WeakKeyDictionary()
