"""Make the model and write its directory."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from builtin_tiny.model import CONTEXT_LENGTH, VOCAB_SIZE, random_model
from builtin_tiny.pretraining import pretrain
from builtin_tiny.tokenizer import train_tokenizer
from nat_plugin_evsys.engine.model import builtin

SHIPPED = Path(builtin.__file__).parent / "builtin_data" / "tiny"


def make(directory: Path, *, seed: int, steps: int) -> None:
    """Write config, tokenizer, chat template and weights to ``directory``.

    The weights are stored in float16, which halves the file; whoever loads them gets these very numbers in float32.
    """
    template = (SHIPPED / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(VOCAB_SIZE, CONTEXT_LENGTH, template)
    model = random_model(tokenizer, seed)
    torch.set_num_threads(1)
    pretrain(model, tokenizer, seed=seed, steps=steps, batch_tokens=1792, lr=3e-3)
    tokenizer.save_pretrained(directory)
    model.half().save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    model.config.dtype = "float32"  # what they are loaded as
    model.config.save_pretrained(directory)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make-builtin-tiny", description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=SHIPPED, help="default: where the package ships it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    make(given.directory, seed=given.seed, steps=given.steps)


if __name__ == "__main__":
    main()
