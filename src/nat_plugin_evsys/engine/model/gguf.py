"""Models in GGUF files, read by transformers' own loader into plain weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from nat_plugin_evsys.errors import ModelError

SUFFIX = ".gguf"
READERS = ("accelerate", "gguf")
"""The packages that transformers reads such files with."""

INSTALL = f"pip install {' '.join(READERS)}"


def gguf_files(directory: Path) -> list[Path]:
    """The GGUF files in a directory, by name."""
    return sorted(path for path in directory.iterdir() if path.suffix == SUFFIX)


def can_read() -> bool:
    """Whether the packages that read GGUF files are installed."""
    return all(importlib.util.find_spec(name) for name in READERS)


def check_reader(base_model: str) -> None:
    """Refuse in one sentence what would fail later in transformers.

    Raises:
        ModelError: the packages that read it are not installed.
    """
    if not can_read():
        raise ModelError(
            f"base_model {base_model!r} is a GGUF file, and the packages that read it are not installed: {INSTALL}"
        )


def loading_options(file: Path) -> dict[str, Any]:
    """Extra arguments of a model's ``from_pretrained(file.parent, …)``, so that its layers are plain.

    Newer transformers would keep the weights packed if it has a kernel for them, in layers unknown to LoRA.
    """
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options
