"""Whether anything answers at the addresses in the YAML: asked once something has failed."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nat_plugin_evsys.calls import DropReason
from nat_plugin_evsys.finetuning.checks.references import reachable_texts
from nat_plugin_evsys.rollouts.attempts import Attempt

if TYPE_CHECKING:
    from nat.data_models.config import Config

_PORTS = {"http": 80, "https": 443}
_SECONDS = 2.0


def with_dead_addresses(attempts: list[Attempt], config: Config, reward_name: str) -> list[Attempt]:
    """The attempts; an error of the evaluator, or of the workflow, also says which addresses it uses are dead.

    Connects to every address in the YAML of what failed, two seconds at most for each.
    """
    unscored = {attempt.lost is DropReason.EVALUATOR_ERROR for attempt in attempts if attempt.error is not None}
    said = {
        failed: dead_addresses(config, f"eval.evaluators.{reward_name}" if failed else "workflow")
        for failed in unscored
    }
    return [
        attempt
        if attempt.error is None
        else replace(attempt, error=attempt.error + said[attempt.lost is DropReason.EVALUATOR_ERROR])
        for attempt in attempts
    ]


def dead_addresses(config: Config, path: str) -> str:
    """A clause for each address, at the component or at what it refers to, where nothing listens; "" if all do.

    Args:
        path: ``workflow``, or ``eval.evaluators.NAME``.
    """
    part = config.workflow if path == "workflow" else config.eval.evaluators[path.rpartition(".")[2]]
    problems = {
        setting: problem
        for setting, text in reachable_texts(config, path, part)
        if (problem := _problem(text)) is not None
    }
    return "".join(
        f"; `{path}` uses `{setting}`, and nothing answers there ({problem}): start it, or correct `{setting}`"
        for setting, problem in problems.items()
    )


def _problem(text: str) -> str | None:
    """Why nothing can be reached at a URL; None if something listens, or if it is no URL."""
    try:
        url = urlsplit(text)
        port = url.port or _PORTS.get(url.scheme)
    except ValueError:
        return None
    if url.scheme not in _PORTS or not url.hostname:
        return None
    try:
        socket.create_connection((url.hostname, port), timeout=_SECONDS).close()
    except OSError as error:
        return f"{text}: {error}"
    return None
