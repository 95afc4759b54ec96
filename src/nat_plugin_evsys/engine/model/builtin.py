"""``builtin/…`` base models, which need neither a download nor a hub.

``builtin/tiny`` is in this package: a Qwen3 with a million weights, trained on some made-up chats (see
``scripts/make-builtin-tiny``), the same on every machine. It is for tests and a first try that takes a minute.

The others are built on this machine from an installed package, and cached. The cache holds plain Hugging Face
directories. A directory's name holds a digest of the model's recipe, so that a new release never reads an old release's
model, and the directory holds a checksum of each of its files, so that a damaged one is rebuilt.
"""

from __future__ import annotations

import json
import logging
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nat_plugin_evsys.engine.model.builtin_smollm2 import SmolLM2Recipe
from nat_plugin_evsys.errors import ModelError
from nat_plugin_evsys.files import atomic_directory
from nat_plugin_evsys.json_lines import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PREFIX = "builtin/"

CHECKSUMS = "checksums.json"
_READ_BYTES = 1 << 24


class Recipe(Protocol):
    """How to build a builtin model that is not part of this package."""

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence."""

    def digest(self) -> str:
        """Hex digits that change whenever the result of ``build`` changes."""

    def is_available(self) -> bool:
        """Whether everything that ``build`` needs is installed."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone, without building the model.

        Raises:
            ModelError: something is not installed; the message says what to type.
        """

    def build(self, directory: Path) -> None:
        """Save model and tokenizer, in Hugging Face's format, into an empty directory.

        Raises:
            ModelError: something is not installed; the message says what to type.
        """


SHIPPED = {"builtin/tiny": Path(__file__).parent / "builtin_data" / "tiny"}
RECIPES: dict[str, Recipe] = {"builtin/smollm2-135m": SmolLM2Recipe()}


def ensure_builtin(name: str, cache_dir: Path) -> Path:
    """Return the Hugging Face directory of a builtin model, building it under ``cache_dir`` if necessary.

    Models of this package do not touch ``cache_dir``. Any other is built next to its final place and moved there in
    one step. Racing processes may each build it; the copies are the same, and each process ends up with a complete
    one.

    Args:
        name: one of ``SHIPPED`` or ``RECIPES``.
        cache_dir: where builtin models are kept; created if missing.

    Raises:
        ModelError: no builtin model has that name, its sources are not installed, or ``cache_dir`` cannot be
            written.
    """
    if name in SHIPPED:
        return SHIPPED[name]
    recipe, target = _recipe(name), _directory(name, cache_dir)
    if _is_whole(target):
        return target
    if target.exists():
        logger.warning("%s is damaged; rebuilding `%s`", target, name)
    try:
        with atomic_directory(target) as building:
            recipe.build(building)
            (building / CHECKSUMS).write_text(to_json(_checksums(building), indent=1))
    except OSError as error:
        # Another process may have put its own (identical) copy into place first.
        if not _is_whole(target):
            raise ModelError(
                f"cannot build `{name}` at {target}: {error}; set EVSYS_CACHE to a directory with space"
            ) from error
    return target


def builtin_tokenizer(name: str, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a builtin model, as in the directory of ``ensure_builtin``; the model is not built.

    Raises:
        ModelError: no builtin model has that name, or its sources are not installed.
    """
    from transformers import AutoTokenizer

    made = SHIPPED.get(name) or _directory(name, cache_dir)
    if name not in SHIPPED and not _is_whole(made):
        return _recipe(name).tokenizer()
    return AutoTokenizer.from_pretrained(made, local_files_only=True)


def available_builtins() -> dict[str, int]:
    """The builtin models that this machine has or can build, and the context length of each in tokens."""
    shipped = {name: json.loads((path / "config.json").read_text()) for name, path in SHIPPED.items()}
    lengths: dict[str, int] = {name: config["max_position_embeddings"] for name, config in shipped.items()}
    return lengths | {name: recipe.context_length for name, recipe in RECIPES.items() if recipe.is_available()}


def _recipe(name: str) -> Recipe:
    recipe = RECIPES.get(name)
    if recipe is None:
        known = ", ".join(f"`{known}`" for known in sorted([*SHIPPED, *RECIPES]))
        raise ModelError(f"there is no builtin model `{name}`; base_model can be {known}, a hub id or a directory")
    return recipe


def _directory(name: str, cache_dir: Path) -> Path:
    return cache_dir / f"{name.removeprefix(PREFIX)}-{_recipe(name).digest()}"


def _checksums(directory: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of each file; against damage, not against an attacker, and ten times as fast as a digest."""
    return {path.name: [path.stat().st_size, _crc32(path)] for path in sorted(directory.iterdir())}


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            crc = zlib.crc32(block, crc)
    return crc


def _is_whole(directory: Path) -> bool:
    try:
        expected = json.loads((directory / CHECKSUMS).read_text())
        return all(
            (directory / name).stat().st_size == size and _crc32(directory / name) == crc
            for name, (size, crc) in expected.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):
        # No such directory, a missing file, or a list of checksums that is damaged itself.
        return False
