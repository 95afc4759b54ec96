"""Whatever the grammar of a family's form lets through is read by that form's parser as calls of the tools' schemas."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest

from nat_plugin_evsys.engine.sampling.grammars import Constraint, Grammars
from nat_plugin_evsys.errors import ApiError, DataError
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.reply_forms import ReplyForms
from nat_plugin_evsys.policy.request import ChatCompletionRequest
from nat_plugin_evsys.policy.sampling import constraint_of
from nat_plugin_evsys.policy.tool_calls import AssistantReply, assemble
from nat_plugin_evsys.policy.tool_forms.families import FORMS, create_parser
from nat_plugin_evsys.policy.tool_forms.form import ToolForm

DEEPSEEK = ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")
HARMONY = ("start", "channel", "message", "constrain", "end", "call", "return")
MARKERS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *(f"<｜tool▁{name}｜>" for name in DEEPSEEK),
    *(f"<|{name}|>" for name in HARMONY),
]
ODD_TEXTS = [*MARKERS, "</parameter>", "</function>", "<function=", '{"name": "rate"}', "[rate()]", "null", "\n"]
MOST_TOKENS = 300
TEMPLATES = {
    "hermes": [""],
    "qwen3_xml": [""],
    "llama3_json": [""],
    "pythonic": [""],
    "mistral": ["", "[ARGS]", "[CALL_ID][ARGS]"],
    "deepseek": ["", "```json"],
    "harmony": [""],
}
VARIANTS = [family(template) for family in FORMS for template in TEMPLATES[family.name]]
CASES = [(form, special) for form in VARIANTS for special in (True, False)]
SHORT = {"type": "string", "maxLength": 4}
ROUTE = {
    "type": "object",
    "properties": {
        "note": SHORT,
        "team": {"$ref": "#/$defs/Team"},
        "remark": {"anyOf": [SHORT, {"type": "null"}]},
        "urgent": {"type": "boolean"},
        "level": {"type": ["integer", "null"], "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a</parameter>", "b"]}, "maxItems": 2},
    },
    "required": ["note", "urgent"],
    "additionalProperties": False,
    "$defs": {"Team": {"enum": ["billing", "café", "12"]}},
}
DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
RATE = {"type": "object", "properties": {"level": DIGIT}, "required": ["level"], "additionalProperties": False}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "route", "strict": True, "parameters": ROUTE}},
    {"type": "function", "function": {"name": "rate", "parameters": RATE}},
    {"type": "function", "function": {"name": "now"}},
]
ASKED: dict[str, dict[str, Any]] = {
    "free": {},
    "one": {"parallel_tool_calls": False},
    "required": {"tool_choice": "required"},
    "named": {"tool_choice": {"type": "function", "function": {"name": "route"}}},
}


def fits(name: str, arguments: dict[str, Any]) -> bool:
    """Whether arguments are of the tool's schema."""
    if name == "rate":
        return set(arguments) == {"level"} and type(arguments["level"]) is int and 0 <= arguments["level"] <= 9
    if name == "now":
        return arguments == {}
    known = {
        "note": lambda value: isinstance(value, str) and len(value) <= 4,
        "team": lambda value: value in ("billing", "café", "12"),
        "remark": lambda value: value is None or (isinstance(value, str) and len(value) <= 4),
        "urgent": lambda value: isinstance(value, bool),
        "level": lambda value: value is None or (type(value) is int and 0 <= value <= 99),
        "tags": lambda value: len(value) <= 2 and set(value) <= {"a</parameter>", "b"},
    }
    return {"note", "urgent"} <= set(arguments) and all(known[key](value) for key, value in arguments.items())


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer whose control tokens are all the markers, or those alone that it comes with."""

    tokenizer: Any
    grammars: Grammars
    end: int
    special: dict[str, int]
    spelt: list[list[int]]


@pytest.fixture(scope="module")
def vocabularies(tokenizer: Any) -> dict[bool, Vocabulary]:
    made = {}
    for all_special in (True, False):
        copy = deepcopy(tokenizer)
        if all_special:
            copy.add_special_tokens({"additional_special_tokens": MARKERS})
        special = {text: id for text, id in copy.get_vocab().items() if id in copy.added_tokens_decoder}
        spelt = [copy(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in ODD_TEXTS]
        end = copy.eos_token_id
        made[all_special] = Vocabulary(copy, Grammars(copy, len(copy), frozenset([end])), end, special, spelt)
    return made


def walk(vocabulary: Vocabulary, constraint: Constraint, dice: random.Random) -> tuple[list[int], list[int], bool]:
    """Tokens at random, those with one choice, and whether the sentence ended."""
    state, ids, forced, queue = constraint.begin(), [], [], []
    marked = set(vocabulary.special.values())
    while not state.ended and len(ids) < MOST_TOKENS:
        allowed = state.allowed.nonzero()[0].tolist()
        if not queue and dice.random() < 0.2:
            queue = list(dice.choice(vocabulary.spelt))
        if queue and state.allowed[queue[0]]:
            token = queue.pop(0)
        else:
            queue = []
            ends = [each for each in allowed if each in constraint.ends]
            rare = [each for each in allowed if each in marked]
            likely = ends if ends and dice.random() < 0.3 else rare if rare and dice.random() < 0.2 else allowed
            token = dice.choice(likely)
        if len(allowed) == 1:
            forced.append(len(ids))
        ids.append(token)
        state.accept(token)
    return ids, forced, state.ended


def read(form: ToolForm, text: str) -> tuple[AssistantReply, int]:
    parser = create_parser(form, tools=TOOLS, reply_id="r")
    pieces = parser.feed(text[: len(text) // 2]) + parser.feed(text[len(text) // 2 :]) + parser.finish()
    return assemble(pieces), parser.malformed


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("form", "special"), CASES, ids=[f"{form.name}-{special}" for form, special in CASES])
def test_what_a_grammar_lets_through_is_read(
    vocabularies: dict[bool, Vocabulary], form: ToolForm, special: bool, asked: str
) -> None:
    vocabulary = vocabularies[special]
    request = ChatCompletionRequest.parse(
        {"model": "m", "messages": [{"role": "user", "content": "?"}], "tools": TOOLS, **ASKED[asked]}
    )
    grammar = ReplyForms(form, vocabulary.special.get).grammar(request)
    assert grammar is not None
    assert grammar.unheld == []
    constraint = vocabulary.grammars.compile(grammar.text, grammar.ends or [vocabulary.end])
    dice, whole, made = random.Random(f"{form.name}{asked}"), 0, 0
    for _ in range(8):
        ids, forced, ended = walk(vocabulary, constraint, dice)
        assert constraint.forced(ids) == forced
        if not ended:
            continue
        text = vocabulary.tokenizer.decode([*constraint.prefix, *ids[:-1]], skip_special_tokens=False)
        reply, malformed = read(form, text)
        calls = [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]
        assert malformed == 0, text
        assert all(fits(*call) for call in calls), text
        if asked in ("required", "named"):
            assert calls, text
            assert not reply.content, text
        if asked == "named":
            assert [name for name, _ in calls] == ["route"], text
        if asked == "one":
            assert len(calls) <= 1, text
        whole, made = whole + 1, made + len(calls)
    assert whole >= 3
    assert made or asked not in ("required", "named")


def asks(name: str, schema: dict[str, Any]) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}}]
    messages = [{"role": "user", "content": "?"}]
    return ChatCompletionRequest.parse({"model": "m", "messages": messages, "tools": tools, "tool_choice": "required"})


@pytest.mark.parametrize(
    ("form", "name", "key"),
    [
        ("pythonic", "get-weather", "a"),
        ("pythonic", "get", "class"),
        ("mistral", "get it", "a"),
        ("qwen3_xml", "get", "a>b"),
    ],
)
def test_a_call_that_a_form_cannot_write_is_refused_by_name(form: str, name: str, key: str) -> None:
    family = next(each("[ARGS]") for each in FORMS if each.name == form)
    request = asks(name, {"type": "object", "properties": {key: {"type": "string"}}})
    with pytest.raises(DataError, match=f"{name}|{key}.*hints: ignore"):
        ReplyForms(family, lambda text: None).grammar(request)


def test_a_refusal_reaches_the_client_with_the_field(tokenizer: Any, vocabularies: dict[bool, Vocabulary]) -> None:
    template = (
        "{% if tools %}[func_name1(a=b)] {{ tools }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    renderer, grammars = ChatRenderer(tokenizer, chat_template=template), vocabularies[False].grammars
    client: Any = type("Client", (), {"grammars": grammars})()
    constraint, unmet = constraint_of(asks("rate", RATE), "honour", renderer, client, thinking=False)
    assert constraint is not None
    assert unmet == ""
    assert tokenizer.decode(constraint.prefix) == "[rate(level="
    with pytest.raises(ApiError, match="`tool_choice`: 'get-weather' is no name in Python") as caught:
        constraint_of(asks("get-weather", RATE), "honour", renderer, client, thinking=False)
    assert caught.value.status == 400


def test_what_bare_strings_cannot_be_held_to_is_said() -> None:
    family = next(each() for each in FORMS if each.name == "qwen3_xml")
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    grammar = ReplyForms(family, lambda text: None).grammar(asks("plan", schema))
    assert grammar is not None
    assert grammar.unheld == ["`format` of `day` of `plan`: this model writes strings bare"]
