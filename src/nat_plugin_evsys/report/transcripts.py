"""Rollouts in a terminal.

Model output is shown as text, never as markup, and its control characters are made visible, so that no reply can
repaint the terminal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from nat_plugin_evsys.errors import visible
from nat_plugin_evsys.report.contents import content_text
from nat_plugin_evsys.report.questions import question_text
from nat_plugin_evsys.runs.rollouts import RolloutFacts

if TYPE_CHECKING:
    from nat.atif import Step, Trajectory

_ROLE_STYLES = {"system": "dim", "user": "bold", "agent": "bold cyan"}


def transcript(trajectory: Trajectory) -> RenderableType:
    """One rollout: its facts, the conversation, and what the evaluator said."""
    facts = RolloutFacts.of(trajectory.extra)
    lines = [_facts_line(facts), *_question_lines(facts, trajectory.steps)]
    for step in trajectory.steps:
        lines += _step_lines(step)
    lines += list(_verdict_lines(facts))
    return Panel(Group(*lines), title=_title(facts), title_align="left", border_style=_colour(facts.reward))


def _title(facts: RolloutFacts) -> Text:
    """Only the reward: a panel cuts a title that is wider than the terminal."""
    return Text("no reward" if facts.reward is None else f"reward {facts.reward:g}", f"bold {_colour(facts.reward)}")


def _facts_line(facts: RolloutFacts) -> Text:
    parts = [f"row {visible(facts.row_id)}", f"attempt {facts.attempt + 1}"]
    if facts.policy_versions:
        parts.append("policy " + ", ".join(map(str, facts.policy_versions)))
    parts.append(f"not trained on: {facts.dropped}" if facts.dropped else f"advantage {facts.advantage or 0:+.3f}")
    if facts.seconds is not None:
        parts.append(f"{facts.seconds:.1f} s")
    return Text("  ".join(parts), style="dim")


def _question_lines(facts: RolloutFacts, steps: Iterable[Step]) -> Iterator[Text]:
    """What the row asks, unless a message of the conversation says it in the same words."""
    asked = question_text(facts.question) or facts.question
    if asked and not any(isinstance(step.message, str) and str(asked) in step.message for step in steps):
        yield _labelled("question", asked)


def _colour(reward: float | None) -> str:
    if reward is None:
        return "magenta"
    return "green" if reward > 0 else "red"


def _step_lines(step: Step) -> Iterator[Text]:
    role = str((step.extra or {}).get("role", "assistant" if step.source == "agent" else step.source))
    heading = Text(role, style=_ROLE_STYLES[step.source])
    if step.metrics is not None:
        heading.append(f"  {step.metrics.completion_tokens} tokens", style="dim")
        if (step.extra or {}).get("stop_reason") == "length":
            heading.append("  cut at max_tokens", style="yellow")
    elif step.is_copied_context:
        heading.append("  not sampled in this run", style="dim")
    yield heading
    if step.message:
        yield _indented(content_text(step.message), _body_style(step))
    for call in step.tool_calls or ():
        raw = (call.extra or {}).get("raw_arguments")
        arguments = raw if raw is not None else json.dumps(call.arguments, ensure_ascii=False)
        yield _indented(f"→ {call.function_name}({arguments})", "blue")
    for result in step.observation.results if step.observation else ():
        yield _indented(f"← {content_text(result.content)}", "green")


def _body_style(step: Step) -> str:
    return "dim" if step.source == "system" else ""


def _verdict_lines(facts: RolloutFacts) -> Iterator[Text]:
    if facts.expected not in (None, ""):
        yield _labelled("expected", facts.expected)
    if facts.reasoning not in (None, "", {}, []):
        yield _labelled("evaluator", facts.reasoning)
    if facts.error:
        yield _labelled("error", facts.error, "red")


def _labelled(label: str, value: Any, style: str = "") -> Text:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return Text.assemble((f"{label}  ", "dim"), (visible(text), style))


def _indented(text: str, style: str) -> Text:
    return Text("\n".join(f"  {line}" for line in visible(text).split("\n")), style=style)
