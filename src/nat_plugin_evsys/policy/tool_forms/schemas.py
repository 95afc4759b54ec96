"""The parameters of a tool, for the forms that write them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

Schema = Mapping[str, Any]

_OF_TEXT = ("pattern", "format")


@dataclass(frozen=True, slots=True)
class Text:
    """A parameter that is a string and nothing else, but for null.

    Attributes:
        choices: the only values, if they are listed.
        shortest, longest: in characters.
        nullable: may be null.
        unheld: keywords of its schema that this does not say.
    """

    choices: tuple[str, ...] | None = None
    shortest: int = 0
    longest: int | None = None
    nullable: bool = False
    unheld: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """One property of a tool's parameters; ``schema`` stands on its own."""

    name: str
    schema: dict[str, Any]
    required: bool

    @property
    def text(self) -> Text | None:
        """What it is if it is a string; None if it may be something else."""
        return _text(self.schema, self.schema)


def check_parameters(name: str, schema: Any) -> None:
    """Check the ``parameters`` that a request gives a tool, as far as ``parameters`` reads them.

    Raises:
        ValueError: a part is of another type than a JSON schema has there.
    """
    if schema is None:
        return
    if not isinstance(schema, dict):
        raise ValueError(f"the `parameters` of `{name}` must be a JSON schema, which is an object")
    if not isinstance(schema.get("properties") or {}, dict):
        raise ValueError(f"`parameters.properties` of `{name}` must be an object")
    required = schema.get("required") or []
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        raise ValueError(f"`parameters.required` of `{name}` must be a list of names")


def parameters(schema: Schema) -> list[Parameter]:
    """The properties of a tool's parameters, in order; those that are only required come last."""
    properties = schema.get("properties") or {}
    required = schema.get("required") or []
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return [
        Parameter(name, {**_object(properties.get(name)), **shared}, name in required)
        for name in dict.fromkeys([*properties, *required])
    ]


def without_null(schema: Schema) -> tuple[dict[str, Any], bool]:
    """A schema without null, and whether it allowed that."""
    found = _resolved(schema, schema)
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    for word in ("anyOf", "oneOf"):
        options = found.get(word)
        if isinstance(options, list) and (rest := [each for each in options if not _is_null(each)]) != options:
            return {**(_object(rest[0]) if len(rest) == 1 else {word: rest}), **shared}, True
    kinds = found.get("type")
    if isinstance(kinds, list) and "null" in kinds and "enum" not in found:
        rest = [kind for kind in kinds if kind != "null"]
        return {**found, **shared, "type": rest[0] if len(rest) == 1 else rest}, True
    return {**found, **shared}, False


def _text(schema: Schema, root: Schema) -> Text | None:
    schema = _resolved(schema, root)
    for word in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(word), list):
            others = [each for each in options if not _is_null(each)]
            text = _text(_object(others[0]), root) if len(others) == 1 else None
            return text and replace(text, nullable=text.nullable or len(others) < len(options))
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    if isinstance(values, list):
        choices = tuple(value for value in values if isinstance(value, str))
        if not choices or len(choices) + values.count(None) < len(values):
            return None
        return Text(choices, nullable=None in values)
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "string" not in kinds or any(kind not in ("string", "null") for kind in kinds):
        return None
    unheld = tuple(word for word in _OF_TEXT if word in schema)
    return Text(None, _length(schema, "minLength") or 0, _length(schema, "maxLength"), "null" in kinds, unheld)


def _length(schema: Schema, word: str) -> int | None:
    length = schema.get(word)
    return length if type(length) is int and length >= 0 else None


def _resolved(schema: Schema, root: Schema) -> Schema:
    """The schema that a reference within ``root`` stands for."""
    for _ in range(8):
        path = schema.get("$ref")
        if path is None and isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
            schema = _object(parts[0])
            continue
        if not isinstance(path, str) or not path.startswith("#/"):
            break
        found: Any = root
        for key in path[2:].split("/"):
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            break
        schema = found
    return schema


def _is_null(schema: Any) -> bool:
    return isinstance(schema, dict) and schema.get("type") == "null"


def _object(schema: Any) -> dict[str, Any]:
    """A schema as an object; true is that of any value."""
    return dict(schema) if isinstance(schema, dict) else {}
