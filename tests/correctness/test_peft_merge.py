"""A saved adapter loads in ``peft`` and merges into the base model to the logits that the engine has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import PROVED, perturb
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.engine.model.lora import LoraAdapter, applied

IDS = torch.tensor([[5, 17, 99, 3, 42, 150, 7, 7, 31, 180, 2, 64, 11, 90, 23, 1, 77, 8, 133, 54]])
TOLERANCE = 1e-5


def untie(model: Any) -> None:
    """Give the unembedding a weight of its own: a delta on it must not reach the embedding."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("unembed", [False, True])
@pytest.mark.parametrize("family", list(PROVED))
async def test_the_merged_model_has_the_engines_logits(
    family: str,
    unembed: bool,
    base_of: Callable[[str], Any],
    model_dir: Callable[[str], Path],
    measured: Callable[..., None],
    tmp_path: Path,
) -> None:
    base = base_of(family)
    adapter = perturb(LoraAdapter.create(base.model, rank=4, alpha=8.0, train_unembed=unembed), seed=2)
    backend = LocalBackend(base, adapter, checkpoint_dir=tmp_path)
    saved = await backend.save_for_sampler("adapter")
    await backend.close()
    with torch.no_grad():
        with applied(adapter):
            engine = base.model(input_ids=IDS).logits
        with applied(None):
            assert relative(base.model(input_ids=IDS).logits, engine) > 0.01, "the adapter must matter"
        plain = AutoModelForCausalLM.from_pretrained(model_dir(family))
        loaded = PeftModel.from_pretrained(plain, saved)
        assert len([n for n, _ in loaded.named_parameters() if "lora_" in n]) == 2 * len(adapter.weights)
        attached = relative(loaded(input_ids=IDS).logits, engine)
        if unembed and plain.config.tie_word_embeddings:
            plain = AutoModelForCausalLM.from_pretrained(model_dir(family))
            untie(plain)
            loaded = PeftModel.from_pretrained(plain, saved)
        merged = relative(loaded.merge_and_unload()(input_ids=IDS).logits, engine)
    with_head = " with the unembedding" if unembed else ""
    for what, worst in (("PEFT's logits", attached), ("merged logits", merged)):
        compared = f"{what}{with_head} vs the engine's (relative)"
        measured("9 optimizer and PEFT", compared, PROVED[family], worst=worst, bound=TOLERANCE, logits=engine.numel())
