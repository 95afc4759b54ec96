"""``builtin/tiny``: a model made on the spot, without a download.

It is transformers' own Qwen3, a byte-level BPE tokenizer trained on ``builtin_data/tiny_corpus.txt`` (agent
prompts and tool schemas as NAT sends them, and plain English) and a ChatML chat template with Qwen/Hermes-style tool
calls. It knows what ``builtin_pretraining`` teaches it in half a minute, and no more: it is there to try the whole way
of finetuning in a minute or two on a CPU, and for tests.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nat_plugin_evsys.engine.model import builtin_pretraining
from nat_plugin_evsys.engine.model.builtin_pretraining import pretrain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]
# As in Qwen's tokenizers, these are single tokens but not "special", so that decoding keeps them.
MARKER_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# Qwen's pre-tokenizer: a word with at most one sign before it, single digits, runs of signs, line ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class TinyRecipe:
    """The recipe of ``builtin/tiny``. Whatever is changed in it gives the model another directory."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    context_length: int = 4096
    vocab_size: int = 2048
    weight_std: float = 0.05
    seed: int = 0
    pretraining_steps: int = 200
    pretraining_batch_tokens: int = 1792
    pretraining_lr: float = 3e-3
    recipe: int = 3

    def digest(self) -> str:
        """Twelve hex digits over everything that the model is made of."""
        recipe = json.dumps([asdict(self), SPECIAL_TOKENS, MARKER_TOKENS, SPLIT_PATTERN, *_lessons()], sort_keys=True)
        text = "\0".join([recipe, _data("tiny_corpus.txt"), _data("tiny_chat_template.jinja")])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def is_available(self) -> bool:
        """Always: it is made of what this package brings along."""
        return True

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone; it takes a moment, and no weights."""
        return _tokenizer(self)

    def build(self, directory: Path) -> None:
        """Train the tokenizer and the model, and save both into ``directory``."""
        tokenizer = _tokenizer(self)
        tokenizer.save_pretrained(directory)
        model = _model(self, tokenizer)
        logger.info("builtin/tiny: %d pretraining steps, once; this takes half a minute", self.pretraining_steps)
        with _one_thread():
            pretrain(
                model,
                tokenizer,
                seed=self.seed,
                steps=self.pretraining_steps,
                batch_tokens=self.pretraining_batch_tokens,
                lr=self.pretraining_lr,
            )
        model.save_pretrained(directory)


@cache
def _data(file: str) -> str:
    return (Path(__file__).parent / "builtin_data" / file).read_text(encoding="utf-8")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are taken in one order whatever the machine's cores; on matrices this small a second thread gains little."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lessons() -> list[object]:
    """What the pretraining is made of; the first chats stand for the code that makes them."""
    return [list(builtin_pretraining.chats(0, 40)), builtin_pretraining.PROMPT_WEIGHT]


def _tokenizer(recipe: TinyRecipe) -> PreTrainedTokenizerBase:
    """Train the byte-level BPE tokenizer: every byte is in its alphabet, so every text can be written and read back."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size - len(MARKER_TOKENS),
        min_frequency=1,
        show_progress=False,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator([_data("tiny_corpus.txt")], trainer=trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=_data("tiny_chat_template.jinja"),
        clean_up_tokenization_spaces=False,
        model_max_length=recipe.context_length,
    )


def _model(recipe: TinyRecipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Qwen3 with norms at one and every matrix drawn from a normal distribution, tensor by tensor in name order.

    NumPy's generator draws the same numbers on every machine and thread count; torch's does not promise that.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context_length,
        initializer_range=recipe.weight_std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config)
    rng = np.random.Generator(np.random.PCG64(recipe.seed))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                draw = rng.standard_normal(tuple(parameter.shape), dtype=np.float32) * np.float32(recipe.weight_std)
                parameter.copy_(torch.from_numpy(draw))
    return model
