"""Locates a base model's files on this machine, from what the user typed as ``base_model``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nat_plugin_evsys.engine.model import gguf
from nat_plugin_evsys.engine.model.builtin import PREFIX, ensure_builtin
from nat_plugin_evsys.errors import ModelError

WHAT_TO_TYPE = (
    "give an existing model directory, a hub id such as Qwen/Qwen3-0.6B, a .gguf file, or builtin/smollm2-135m"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A model on this machine.

    Attributes:
        directory: a Hugging Face directory, or the one that the GGUF file is in.
        gguf_file: the GGUF file to read, or None.
    """

    directory: Path
    gguf_file: Path | None = None

    def __str__(self) -> str:
        return str(self.gguf_file or self.directory)

    def tokenizer_options(self) -> dict[str, Any]:
        """Arguments of ``AutoTokenizer.from_pretrained(directory, …)``."""
        return {"local_files_only": True} | ({"gguf_file": self.gguf_file.name} if self.gguf_file else {})

    def model_options(self) -> dict[str, Any]:
        """Arguments of ``AutoModelForCausalLM.from_pretrained(directory, …)``."""
        return {"local_files_only": True} | (gguf.loading_options(self.gguf_file) if self.gguf_file else {})


def find_local(base_model: str, cache_dir: Path) -> LocalSource | None:
    """The model's files (a builtin model is built if necessary); None for what can only be a hub id.

    Raises:
        ModelError: it can be neither, a directory has no model or several GGUF files, or a builtin model cannot be
            made; the message says what to type.
    """
    if base_model.startswith(PREFIX):
        return LocalSource(ensure_builtin(base_model, cache_dir))
    path = Path(base_model).expanduser()
    if path.is_dir():
        return _in_directory(base_model, path)
    if path.is_file() and path.suffix == gguf.SUFFIX:
        gguf.check_reader(base_model)
        return LocalSource(path.parent, path)
    if path.exists():
        raise ModelError(f"base_model {base_model!r} is a file, but not a .gguf file; {WHAT_TO_TYPE}")
    if path.suffix == gguf.SUFFIX or not _HUB_ID.fullmatch(base_model):
        what = "file" if path.suffix == gguf.SUFFIX else "directory"
        raise ModelError(f"base_model {base_model!r}: no such {what} below {Path.cwd()}; {WHAT_TO_TYPE}")
    return None


def local_key(base_model: str) -> str:
    """One name for all spellings of a model on this machine; a name without a file or directory is kept as it is."""
    path = Path(base_model).expanduser()
    if not path.exists():
        return base_model
    if path.is_dir() and not _is_hugging_face(path):
        files = gguf.gguf_files(path)
        path = files[0] if len(files) == 1 else path
    return str(path.resolve())


def is_local(base_model: str) -> bool:
    """Whether ``find_local`` would look no further than this machine."""
    return base_model.startswith(PREFIX) or Path(base_model).expanduser().exists()


def _is_hugging_face(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _in_directory(base_model: str, directory: Path) -> LocalSource:
    if _is_hugging_face(directory):
        return LocalSource(directory)
    files = gguf.gguf_files(directory)
    if not files:
        raise ModelError(
            f"base_model {base_model!r} is a directory without config.json and without a .gguf file; {WHAT_TO_TYPE}"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(
            f"base_model {base_model!r} has several .gguf files ({names}); name one of them, such as "
            f"{directory / files[0].name}"
        )
    gguf.check_reader(base_model)
    return LocalSource(directory, files[0])
