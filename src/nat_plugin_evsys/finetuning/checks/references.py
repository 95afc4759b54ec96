"""What the components of a NAT configuration name: strings at any depth, other components, addresses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

if TYPE_CHECKING:
    from nat.data_models.config import Config


def texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """``(path, text)`` of every string that a configuration holds; a reference to a component is one too."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from texts(getattr(value, name), _below(path, name))
        yield from texts(value.model_extra or {}, path)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from texts(item, _below(path, str(name)))
    elif isinstance(value, list | tuple | set):
        for number, item in enumerate(value):
            yield from texts(item, _below(path, str(number)))


def reachable_texts(config: Config, path: str, part: BaseModel) -> list[tuple[str, str]]:
    """``texts`` of a component, and of all components that it refers to, and so on.

    Args:
        path: where the component is in the YAML.
    """
    from nat.data_models.component_ref import ComponentRef

    found: list[tuple[str, str]] = []
    waiting, seen = [(path, part)], {path}
    while waiting:
        own = list(texts(waiting[0][1], waiting.pop(0)[0]))
        found += own
        for _, text in own:
            if not isinstance(text, ComponentRef):
                continue
            section = text.component_group.value
            target, place = getattr(config, section, {}).get(text), f"{section}.{text}"
            if target is not None and place not in seen:
                seen.add(place)
                waiting.append((place, target))
    return found


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
