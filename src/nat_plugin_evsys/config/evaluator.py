"""``eval: evaluators: <name>: {_type: evsys_exact_match, …}``: rewards that need no judge."""

from typing import Literal

from nat.data_models.evaluator import EvaluatorBaseConfig
from pydantic import Field, field_validator, model_validator

from nat_plugin_evsys.config.strict import StrictConfig


class EvsysExactMatchConfig(StrictConfig, EvaluatorBaseConfig, name="evsys_exact_match"):
    """Scores 1.0 when the workflow's output matches the row's expected answer, else 0.0."""

    mode: Literal["exact", "one_of", "contains", "regex"] = Field(
        default="exact",
        description="`exact`: the output is the expected answer. `one_of`: the output contains the expected answer and "
        "none of the other `choices`. `contains`: the output contains the expected answer; as a reward, a policy can "
        "win it by listing every answer. `regex`: the expected answer is a regular expression that matches somewhere "
        "in the output.",
    )
    choices: list[str] = Field(
        default=[], description="With `mode: one_of`, all answers that a row may expect, each one or more words."
    )
    ignore_case: bool = Field(default=True, description="Ignore upper and lower case.")
    ignore_whitespace: bool = Field(
        default=True, description="Strip both ends and collapse runs of whitespace before comparing."
    )

    @field_validator("choices")
    @classmethod
    def _no_empty_choice(cls, value: list[str]) -> list[str]:
        if not all(choice.strip() for choice in value):
            raise ValueError(f"choices has an empty string among {value}; remove it")
        return value

    @model_validator(mode="after")
    def _choices_and_mode_fit(self) -> "EvsysExactMatchConfig":
        if self.mode == "one_of" and len(self.choices) < 2:
            raise ValueError("mode: one_of needs `choices`, all answers that a row may expect: two or more")
        if self.mode != "one_of" and self.choices:
            raise ValueError(f"choices has no effect with mode: {self.mode}; set mode: one_of, or remove it")
        return self


class EvsysFunctionCallConfig(StrictConfig, EvaluatorBaseConfig, name="evsys_function_call"):
    """Scores 1.0 when the workflow's output is exactly the function calls that the row accepts, else 0.0.

    The output is JSON: a list of `{"name": …, "arguments": {…}}`, or a single one. The row's expected answer has the
    Berkeley Function Calling Leaderboard's form: a list of `{name: {argument: [accepted values]}}`, where "" among the
    values means that the argument may be omitted.
    """

    ignore_order: bool = Field(default=True, description="Accept several calls in any order.")
