"""Tiny models of transformers' causal families, with a tokenizer of one token a byte, from ``families.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

_FILE = Path(__file__).with_suffix(".json")
_VOCABULARY = 320
"""The tokenizer's size rounded up to 64."""


def family_names() -> list[str]:
    """All of them."""
    return sorted(json.loads(_FILE.read_text())["families"])


def save_tiny_family(name: str, directory: Path) -> Path:
    """Write the family's model to ``directory``, as a user would have it. Raises what transformers raises."""
    known = json.loads(_FILE.read_text())
    options: dict[str, Any] = {**known["base"], **known["families"][name]}
    kind = options.pop("model_type")
    options = {k: _VOCABULARY if v == "VOCAB" else v for k, v in options.items() if v != "DROP"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    model.save_pretrained(directory)
    byte_tokenizer("</s>", "<s>").save_pretrained(directory)
    return directory
