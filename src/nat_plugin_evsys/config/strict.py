"""Settings that are refused by name."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Self

from nat.data_models.finetuning import RewardFunctionConfig
from pydantic import BaseModel, ConfigDict, Field, model_validator


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


class RunRewardedConfig(StrictConfig):
    """A section over whose ``reward`` NAT writes the run's."""

    reward: RewardFunctionConfig | None = Field(
        default=None, description="NAT sets it to `finetuning.reward_function`; here it is refused."
    )

    @model_validator(mode="after")
    def _reward_is_the_runs(self) -> Self:
        if self.reward is not None:
            raise ValueError(
                f"reward `{self.reward.name}` has no effect here; set finetuning.reward_function, or the reward of a "
                "trainer adapter, whose policy then has its own"
            )
        return self


def _hint(name: str, known: set[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""
