"""Chooses how prompts with images are sampled: one at a time, from transformers' own cache if that is exact."""

from __future__ import annotations

import logging
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nat_plugin_evsys.engine.model.images import PlacedImage
from nat_plugin_evsys.engine.model.loading import BaseModel
from nat_plugin_evsys.engine.model.lora import applied
from nat_plugin_evsys.engine.model.vision import Vision
from nat_plugin_evsys.engine.sampling.decoding_check import distance, mismatch
from nat_plugin_evsys.engine.sampling.exact_runner import ExactDecoder, ExactRunner
from nat_plugin_evsys.engine.sampling.row_decoder import Context
from nat_plugin_evsys.errors import ModelError

logger = logging.getLogger(__name__)

_BEFORE, _AFTER, _STEPS = 3, 2, 3

_CACHED: WeakKeyDictionary[BaseModel, bool] = WeakKeyDictionary()


def image_runner(base: BaseModel) -> ExactRunner:
    """What runs prompts with images; found out once per base model, with random features in the place of an image.

    Raises:
        ModelError: decoding gives something else than a pass over the whole sequence, with a cache and without.
    """
    if base not in _CACHED:
        _CACHED[base] = _find_out(base)
    return ExactRunner(base, cached=_CACHED[base])


def _find_out(base: BaseModel) -> bool:
    reasons: list[str] = []
    for cached in (True, False):
        reason = mismatch(base, partial(_gap_of, base, cached))
        if not reason:
            if reasons:
                logger.warning("%s: prompts with images are sampled without a cache: %s", base.name, reasons[0])
            return cached
        reasons.append(reason)
    raise ModelError(
        f"cannot sample from images with base_model {base.name!r}: with transformers' cache {reasons[0]}; without a "
        f"cache {reasons[1]}"
    )


def _gap_of(base: BaseModel, cached: bool) -> float:
    """Distance of a few decoded tokens' logits from those of whole passes, as a share of their norm; the worst one."""
    vision = base.vision
    assert isinstance(vision, Vision)
    generator = torch.Generator().manual_seed(0)
    image = vision.probe()

    def draw(count: int) -> list[int]:
        drawn: list[int] = torch.randint(vision.token, (count,), generator=generator).tolist()
        return drawn

    tokens = [*draw(_BEFORE), *[vision.token] * image.tokens, *draw(_AFTER)]
    context = Context(tokens, rows=2, images=(PlacedImage(_BEFORE, image),))
    decoder, gaps = ExactDecoder(ExactRunner(base, cached=cached), None), []
    decoder.join(context)
    found, _ = decoder.step([])
    for _ in range(_STEPS):
        gaps.append(distance(found[-1], _plain(base, vision, tokens, context.images)))
        tokens = [*tokens, *draw(1)]
        found, _ = decoder.step([tokens[-1]] * 2)
    gaps.append(distance(found[0], _plain(base, vision, tokens, context.images)))
    return max(gaps)


def _plain(base: BaseModel, vision: Vision, tokens: list[int], images: tuple[PlacedImage, ...]) -> Tensor:
    """Logits [V] after the last token."""
    with applied(None):
        logits: Tensor = base.model(**vision.inputs(torch.tensor(tokens), images), use_cache=False).logits
    return logits[0, -1].float()
