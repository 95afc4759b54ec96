"""``builtin/…`` base models: made on the spot, without a download.

``builtin/tiny`` is transformers' own Qwen3, a byte-level BPE tokenizer trained on ``builtin_data/corpus.txt`` (agent
prompts and tool schemas as NAT sends them, and plain English) and a ChatML chat template with Qwen/Hermes-style tool
calls. It knows what ``builtin_pretraining`` teaches it in half a minute, and no more: it is there to try the whole way
of finetuning in a minute or two on a CPU, and for tests.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nat_plugin_evsys.engine.model import builtin_pretraining
from nat_plugin_evsys.engine.model.builtin_pretraining import pretrain
from nat_plugin_evsys.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PREFIX = "builtin/"

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]
# As in Qwen's tokenizers, these are single tokens but not "special", so that decoding keeps them.
MARKER_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

# Qwen's pre-tokenizer: a word with at most one sign before it, single digits, runs of signs, line ends, spaces.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class BuiltinSpec:
    """The recipe of a builtin model. Whatever is changed in it gives the model another directory."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    vocab_size: int
    weight_std: float
    seed: int
    pretraining_steps: int
    pretraining_batch_tokens: int
    pretraining_lr: float
    recipe: int = 3


SPECS = {
    "builtin/tiny": BuiltinSpec(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        vocab_size=2048,
        weight_std=0.05,
        seed=0,
        pretraining_steps=200,
        pretraining_batch_tokens=1792,
        pretraining_lr=3e-3,
    )
}


def ensure_builtin(name: str, cache_dir: Path) -> Path:
    """Return the Hugging Face directory of a builtin model, making it under ``cache_dir`` when it is not there.

    The directory's name holds a digest of the recipe, so that a new release never reads an old release's model. It is
    made beside its final place and renamed, so that processes that race all end with one complete directory.

    Args:
        name: ``builtin/tiny``.
        cache_dir: where builtin models are kept; made when missing.

    Raises:
        ModelError: no builtin model has that name, or ``cache_dir`` cannot be written.
    """
    spec = _spec(name)
    target = _directory(name, cache_dir)
    if target.is_dir():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache_dir))
    except OSError as error:
        raise ModelError(f"cannot make `{name}` under {cache_dir}: {error}; choose another cache directory") from error
    try:
        _build(spec, building)
        building.chmod(0o755)
        building.rename(target)
    except OSError as error:
        # Another process may have renamed its own (identical) copy into place first.
        if not target.is_dir():
            raise ModelError(f"cannot make `{name}` at {target}: {error}; choose another cache directory") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def builtin_tokenizer(name: str, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a builtin model, as in the directory that ``ensure_builtin`` makes; the model is not made.

    Raises:
        ModelError: no builtin model has that name.
    """
    spec = _spec(name)
    made = _directory(name, cache_dir)
    if not made.is_dir():
        return _tokenizer(spec)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made, local_files_only=True)


def _spec(name: str) -> BuiltinSpec:
    spec = SPECS.get(name)
    if spec is None:
        known = ", ".join(f"`{known}`" for known in sorted(SPECS))
        raise ModelError(f"there is no builtin model `{name}`; base_model can be {known}, a hub id or a directory")
    return spec


def _directory(name: str, cache_dir: Path) -> Path:
    return cache_dir / f"{name.removeprefix(PREFIX)}-{_digest(_spec(name))}"


@cache
def _data(file: str) -> str:
    return (Path(__file__).parent / "builtin_data" / file).read_text(encoding="utf-8")


def _digest(spec: BuiltinSpec) -> str:
    recipe = json.dumps([asdict(spec), SPECIAL_TOKENS, MARKER_TOKENS, SPLIT_PATTERN, *_lessons()], sort_keys=True)
    text = "\0".join([recipe, _data("corpus.txt"), _data("chat_template.jinja")])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _build(spec: BuiltinSpec, directory: Path) -> None:
    tokenizer = _tokenizer(spec)
    tokenizer.save_pretrained(directory)
    model = _model(spec, tokenizer)
    logger.info("builtin model: pretraining %d steps, once; this takes half a minute", spec.pretraining_steps)
    with _one_thread():
        pretrain(
            model,
            tokenizer,
            seed=spec.seed,
            steps=spec.pretraining_steps,
            batch_tokens=spec.pretraining_batch_tokens,
            lr=spec.pretraining_lr,
        )
    model.save_pretrained(directory)


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


def _tokenizer(spec: BuiltinSpec) -> PreTrainedTokenizerBase:
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
        vocab_size=spec.vocab_size - len(MARKER_TOKENS),
        min_frequency=1,
        show_progress=False,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator([_data("corpus.txt")], trainer=trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKER_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        chat_template=_data("chat_template.jinja"),
        clean_up_tokenization_spaces=False,
        model_max_length=spec.max_position_embeddings,
    )


def _model(spec: BuiltinSpec, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Qwen3 with norms at one and every matrix drawn from a normal distribution, tensor by tensor in name order.

    NumPy's generator draws the same numbers on every machine and thread count; torch's does not promise that.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position_embeddings,
        initializer_range=spec.weight_std,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        model = Qwen3ForCausalLM(config)
    rng = np.random.Generator(np.random.PCG64(spec.seed))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                draw = rng.standard_normal(tuple(parameter.shape), dtype=np.float32) * np.float32(spec.weight_std)
                parameter.copy_(torch.from_numpy(draw))
    return model
