import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from nat_plugin_evsys.engine.model import builtin
from nat_plugin_evsys.engine.model.builtin_tiny import TinyRecipe
from nat_plugin_evsys.errors import ModelError

TOOLS = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}]


def call(city: str, content: str | None = None) -> dict[str, Any]:
    arguments = json.dumps({"city": city})
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": arguments}}],
    }


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


def ids(tokenizer: Any, messages: list[dict[str, Any]], *, opened: bool, tools: Any = TOOLS) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=opened)
    return list(tokenizer(text)["input_ids"])


def test_two_builds_give_identical_files(
    tiny: Path, short_recipe: TinyRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(builtin.RECIPES, "builtin/tiny", short_recipe)
    again = builtin.ensure_builtin("builtin/tiny", tmp_path)
    assert again.name == tiny.name
    names = sorted(path.name for path in tiny.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert [name for name in names if (tiny / name).read_bytes() != (again / name).read_bytes()] == []
    assert [path.name for path in tmp_path.iterdir()] == [again.name], "the build left something behind"


def test_a_model_that_is_there_is_not_built_again(
    tiny: Path, short_recipe: TinyRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(builtin.RECIPES, "builtin/tiny", short_recipe)
    before = (tiny / "model.safetensors").stat().st_mtime_ns
    assert builtin.ensure_builtin("builtin/tiny", tiny.parent) == tiny
    assert (tiny / "model.safetensors").stat().st_mtime_ns == before


def test_another_recipe_has_another_directory(short_recipe: TinyRecipe) -> None:
    assert short_recipe.digest() != TinyRecipe().digest()


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no builtin model `builtin/huge`.*`builtin/smollm2-135m`, `builtin/tiny`"):
        builtin.ensure_builtin("builtin/huge", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loads_through_the_auto_classes(tiny: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
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


def damage_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def tear_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize(
    "harm",
    [
        damage_weights,
        tear_weights,
        lambda directory: (directory / "tokenizer.json").unlink(),
        lambda directory: (directory / builtin.CHECKSUMS).write_text("[1]"),
    ],
    ids=["one bit", "torn", "a file is missing", "checksums are damaged"],
)
def test_what_was_damaged_is_made_again(
    harm: Callable[[Path], None],
    tiny: Path,
    short_recipe: TinyRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(builtin.RECIPES, "builtin/tiny", short_recipe)
    copy = shutil.copytree(tiny, tmp_path / tiny.name)
    harm(copy)
    assert builtin.ensure_builtin("builtin/tiny", tmp_path) == copy
    assert "damaged; making `builtin/tiny` again" in caplog.text
    assert [path.name for path in copy.iterdir() if path.read_bytes() != (tiny / path.name).read_bytes()] == []
    assert [path.name for path in tmp_path.iterdir()] == [tiny.name]


def test_two_processes_that_make_it_at_once_both_end_with_a_whole_one(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from nat_plugin_evsys.engine.model import builtin;"
        "builtin.RECIPES['builtin/tiny'] = builtin.TinyRecipe(pretraining_steps=2); sys.stdin.readline();"
        "print(builtin.ensure_builtin('builtin/tiny', Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    made = {racer.communicate(timeout=250)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0]
    assert made == {str(tmp_path / tiny.name)}
    assert [path.name for path in tmp_path.iterdir()] == [tiny.name]
    assert [
        path.name for path in tiny.iterdir() if path.read_bytes() != (tmp_path / tiny.name / path.name).read_bytes()
    ] == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(ModelError, match=r"cannot make `builtin/tiny` at .*; set EVSYS_CACHE to a directory"):
        builtin.ensure_builtin("builtin/tiny", tmp_path / "file")
