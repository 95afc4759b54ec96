"""``builtin/tiny``: its weights, its tokenizer, its chat template."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nat_plugin_evsys.engine.model.builtin import SHIPPED
from nat_plugin_evsys.engine.model.loading import load_base_model, load_tokenizer

ROOT = Path(__file__).parents[3]
TINY = SHIPPED["builtin/tiny"]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]


def call(city: str, content: str | None = None) -> dict[str, Any]:
    arguments = json.dumps({"city": city})
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}],
    }


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def ids(tokenizer: Any, messages: list[dict[str, Any]], *, opened: bool, tools: Any = TOOLS) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=opened)
    return list(tokenizer(text)["input_ids"])


def test_it_lies_in_the_package_and_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVSYS_CACHE", str(tmp_path / "cache"))
    assert load_base_model("builtin/tiny", device="cpu").context_length == 4096
    assert load_tokenizer("builtin/tiny").eos_token == "<|im_end|>"
    assert list(tmp_path.iterdir()) == []


def test_its_weights_are_those_of_the_file_bit_for_bit() -> None:
    base = load_base_model("builtin/tiny", device="cpu")
    assert base.dtype == torch.float32
    stored = load_file(TINY / "model.safetensors")
    loaded = dict(base.model.named_parameters())
    assert stored.keys() == loaded.keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert [name for name, tensor in stored.items() if not torch.equal(tensor.float(), loaded[name])] == []


def test_the_script_makes_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the numbers of the weights, which are those of the machine that they were trained on."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("builtin_tiny.__main__")
    assert script.SHIPPED == TINY
    script.make(tmp_path, seed=0, steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in TINY.iterdir())
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, TINY)]
    assert configs[0] | {"transformers_version": ""} == configs[1] | {"transformers_version": ""}
    tokenizers = [json.loads((path / "tokenizer.json").read_text()) for path in (tmp_path, TINY)]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]
    assert (tmp_path / "chat_template.jinja").read_bytes() == (TINY / "chat_template.jinja").read_bytes()
    made, shipped = (load_file(path / "model.safetensors") for path in (tmp_path, TINY))
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in shipped.items()}


def test_loads_through_the_auto_classes(tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_token_id, tokenizer.pad_token_id]) == [
        "<|im_end|>",
        "<|endoftext|>",
    ]


@pytest.mark.parametrize("text", ["Ünïcödé 漢字 \u200d🎉", "tab\there  two\n\n end ", "\r\n\x00\x7f", "<tool_call>{}"])
def test_every_text_is_read_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_each_turn_extends_the_tokens_of_the_turn_before(tokenizer: Any) -> None:
    replies = [call("Paris"), {"role": "assistant", "content": "Sunny."}, call("Rome", "One moment."), call("Oslo")]
    between: list[list[dict[str, Any]]] = [
        [
            {"role": "tool", "tool_call_id": "1", "content": "sun"},
            {"role": "tool", "tool_call_id": "2", "content": "x"},
        ],
        [{"role": "user", "content": "And Rome?"}],
        [{"role": "tool", "tool_call_id": "1", "content": "rain"}],
        [],
    ]
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Paris?"}]
    end = tokenizer.eos_token_id
    for reply, following in zip(replies, between, strict=True):
        prompt = ids(tokenizer, messages, opened=True)
        messages = [*messages, reply]
        closed = ids(tokenizer, messages, opened=False)
        closed = closed[: len(closed) - closed[::-1].index(end)]
        assert closed[: len(prompt)] == prompt
        assert closed.count(end) == prompt.count(end) + 1
        messages = [*messages, *following]
        assert ids(tokenizer, messages, opened=True)[: len(closed)] == closed


def test_consecutive_tool_results_share_one_user_turn(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}, call("Paris"), *({"role": "tool", "content": t} for t in "ab")]
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    assert text.endswith(
        '<|im_start|>assistant\n<tool_call>\n{"name": "look", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
    )


def test_without_tools_nothing_speaks_of_tools(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "narrator", "content": "x"}, "unknown message role: narrator"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "type image_url"),
    ],
)
def test_what_the_template_cannot_write_is_refused(tokenizer: Any, message: dict[str, Any], said: str) -> None:
    with pytest.raises(Exception, match=said):
        tokenizer.apply_chat_template([message], tokenize=False)
