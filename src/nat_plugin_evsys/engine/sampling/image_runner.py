"""Chooses how prompts with images are sampled: one at a time, from transformers' own cache if that is exact."""

from __future__ import annotations

import logging
from functools import partial
from typing import NamedTuple
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


class Way(NamedTuple):
    """How a base model's sequences with images are decoded; see ``ExactRunner``."""

    cached: bool
    extends: bool


_WAYS: WeakKeyDictionary[BaseModel, Way] = WeakKeyDictionary()


def image_runner(base: BaseModel) -> ExactRunner:
    """What runs prompts with images; found out once per base model, with random features in the place of an image.

    Raises:
        ModelError: decoding gives something else than a pass over the whole sequence, with a cache and without.
    """
    if base not in _WAYS:
        _WAYS[base] = _find_out(base)
    return ExactRunner(base, cached=_WAYS[base].cached, extends=_WAYS[base].extends)


def _find_out(base: BaseModel) -> Way:
    reasons: list[str] = []
    for cached in (True, False):
        reason = mismatch(base, partial(_gap_of, base, cached))
        if reason:
            reasons.append(reason)
            continue
        if reasons:
            logger.warning("%s: prompts with images are sampled without a cache: %s", base.name, reasons[0])
            return Way(cached=False, extends=False)
        reason = mismatch(base, partial(_gap_of_several, base))
        if reason:
            logger.warning("%s: prompts with images share no prefixes: %s", base.name, reason)
        return Way(cached=True, extends=not reason)
    raise ModelError(
        f"cannot sample from images with base_model {base.name!r}: with transformers' cache {reasons[0]}; without a "
        f"cache {reasons[1]}"
    )


def _probe(base: BaseModel, after: int) -> tuple[Vision, list[int], tuple[PlacedImage, ...]]:
    """What reads images, and a few random tokens with an image among them."""
    vision = base.vision
    assert isinstance(vision, Vision)
    generator = torch.Generator().manual_seed(0)
    drawn: list[int] = torch.randint(vision.token, (_BEFORE + after,), generator=generator).tolist()
    image = vision.probe()
    tokens = [*drawn[:_BEFORE], *[vision.token] * image.tokens, *drawn[_BEFORE:]]
    return vision, tokens, (PlacedImage(_BEFORE, image),)


def _gap_of(base: BaseModel, cached: bool) -> float:
    """Distance of a few decoded tokens' logits from those of whole passes, as a share of their norm; the worst one."""
    vision, whole, images = _probe(base, _AFTER + _STEPS)
    tokens = whole[:-_STEPS]
    decoder, gaps = ExactDecoder(ExactRunner(base, cached=cached), None), []
    decoder.join(Context(tokens, rows=2, images=images))
    found, _ = decoder.step([])
    for token in whole[-_STEPS:]:
        gaps.append(distance(found[-1], _plain(base, vision, tokens, images)))
        tokens = [*tokens, token]
        found, _ = decoder.step([token] * 2)
    gaps.append(distance(found[0], _plain(base, vision, tokens, images)))
    return max(gaps)


def _gap_of_several(base: BaseModel) -> float:
    """The same for tokens that are read at once, on top of a cache that ends with an image, or behind one."""
    vision, tokens, images = _probe(base, _AFTER + _STEPS)
    runner = ExactRunner(base, cached=True)
    gaps = []
    for known in (images[-1].end, images[-1].end + _AFTER):
        _, cache = runner.read(None, tokens[:known], images)
        found, _ = runner.go_on(None, cache, tokens, images, new=len(tokens) - known)
        gaps.append(distance(found, _plain(base, vision, tokens, images)))
    return max(gaps)


def _plain(base: BaseModel, vision: Vision, tokens: list[int], images: tuple[PlacedImage, ...]) -> Tensor:
    """Logits [V] after the last token."""
    with applied(None):
        logits: Tensor = base.model(**vision.inputs(torch.tensor(tokens), images), use_cache=False).logits
    return logits[0, -1].float()
