"""Settings that are refused by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class StrictConfig(BaseModel):
    """Refuses unknown settings in one line that names them; pydantic's own refusal loses the name on NAT's way out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_settings(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {name for name in cls.model_fields if name != "type"}
        unknown = [name for name in data if name not in known | {"_type", "type"}]
        if unknown:
            hints = [f"`{name}`{_hint(name, known)}" for name in unknown]
            kind = data.get("_type") or getattr(cls, "_typed_model_name", None) or cls.__name__
            raise ValueError(f"{kind} has no setting {', '.join(hints)}; it has: {', '.join(sorted(known))}")
        return data


def _hint(name: str, known: set[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""
