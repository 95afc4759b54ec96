"""``eval: evaluators: <name>: {_type: evsys_exact_match, …}``: a reward that needs no judge."""

from typing import Literal

from nat.data_models.evaluator import EvaluatorBaseConfig
from pydantic import Field

from nat_plugin_evsys.config.strict import StrictConfig


class EvsysExactMatchConfig(StrictConfig, EvaluatorBaseConfig, name="evsys_exact_match"):
    """Scores 1.0 when the workflow's output matches the row's expected answer, else 0.0."""

    mode: Literal["exact", "contains", "regex"] = Field(
        default="exact",
        description="`exact`: the output is the expected answer. `contains`: the expected answer lies within the "
        "output. `regex`: the expected answer is a regular expression that matches somewhere in the output.",
    )
    ignore_case: bool = Field(default=True, description="Compare without regard to upper and lower case.")
    ignore_whitespace: bool = Field(
        default=True, description="Strip both ends and take every run of whitespace as one space before comparing."
    )
