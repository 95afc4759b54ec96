"""Training on demonstrations, before the first epoch."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nat_plugin_evsys.errors import ConfigError, DataError, EvsysError
from nat_plugin_evsys.files import no_file
from nat_plugin_evsys.json_lines import lines_of, read_text
from nat_plugin_evsys.training.learning_rate import default_rate
from nat_plugin_evsys.training.sdft import SdftStep, build_lessons, train_sdft
from nat_plugin_evsys.training.sft import SftStep, build_sft_datums, train_sft

if TYPE_CHECKING:
    from nat_plugin_evsys.backends.base import Backend
    from nat_plugin_evsys.config import WarmStartConfig
    from nat_plugin_evsys.policy.policy import Policy

logger = logging.getLogger(__name__)


def load_demonstrations(path: Path) -> list[dict[str, Any]]:
    """Read demonstrations from a JSON array or JSON lines.

    Returns:
        One ``{"messages": [...], "tools": [...]}`` per demonstration, in OpenAI form.

    Raises:
        ConfigError: no such file.
        DataError: not JSON, empty, or a row without messages, without an assistant message or with tools that are none;
            names the row.
    """
    if not path.is_file():
        raise ConfigError(no_file("warm_start.demonstrations", path))
    text = read_text(path)
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines_of(text)]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: neither a JSON array nor JSON lines: {error}") from error
    if not rows:
        raise DataError(f"{path}: has no demonstrations")
    for number, row in enumerate(rows, start=1):
        given: dict[str, Any] = row if isinstance(row, dict) else {}
        messages, tools = (_objects(given.get(name)) for name in ("messages", "tools"))
        if not messages or not any(message.get("role") == "assistant" for message in messages):
            raise DataError(f"{path}: demonstration {number} has no `messages` with an assistant message to learn")
        if tools is None:
            raise DataError(f"{path}: demonstration {number}: `tools` is not a list of tools in OpenAI's form")
    return rows


def _objects(value: Any) -> list[dict[str, Any]] | None:
    """``value`` if it is a list of JSON objects, [] for nothing; None if it is something else."""
    if not value:
        return []
    return value if isinstance(value, list) and all(isinstance(each, dict) for each in value) else None


async def warm_start(
    policy: Policy, config: WarmStartConfig, on_step: Callable[[SftStep | SdftStep], None]
) -> dict[str, float]:
    """Train the policy's adapter on demonstrations and publish the result; the optimizer starts anew after it.

    Args:
        on_step: called after each optimizer step.

    Returns:
        ``demonstrations``, ``steps``, and the loss of the first and the last step: with sft the mean per reply token,
        with sdft the reverse KL per sampled position.
    """
    rows = load_demonstrations(config.demonstrations)
    steps = await (_sft if config.algorithm == "sft" else _sdft)(policy, config, rows, on_step)
    await _reset_optimizer(policy.backend)
    await policy.publish()
    return {
        "demonstrations": len(rows),
        "steps": len(steps),
        "loss_first": steps[0].loss,
        "loss_last": steps[-1].loss,
    }


async def _reset_optimizer(backend: Backend) -> None:
    """Keep the weights and drop Adam's moments.

    The moments of the demonstrations' gradients are much larger than RL's gradients. Kept, they go on moving the policy
    their way for dozens of RL steps, whatever the rewards say.
    """
    state = await backend.save_full_state(f"warm-start-{uuid.uuid4().hex[:12]}")
    await backend.load_state(state)
    try:
        await backend.delete_checkpoint(state)
    except EvsysError as error:
        logger.warning("the warm start's temporary checkpoint %s stays: %s", state, error)


def _rate(config: WarmStartConfig, backend: Backend) -> float:
    chosen = "learning_rate" in config.model_fields_set
    return config.learning_rate if chosen else default_rate(backend.get_architecture())


async def _sft(
    policy: Policy, config: WarmStartConfig, rows: list[dict[str, Any]], on_step: Callable[[SftStep], None]
) -> Sequence[SftStep]:
    renderer = policy.renderer
    return await train_sft(
        policy.backend,
        build_sft_datums(
            rows,
            render=lambda messages, tools: renderer.render([dict(message) for message in messages], tools),
            render_reply=lambda message: renderer.render_reply(dict(message)),
        ),
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=_rate(config, policy.backend),
        seed=config.seed,
        on_step=on_step,
    )


async def _sdft(
    policy: Policy, config: WarmStartConfig, rows: list[dict[str, Any]], on_step: Callable[[SdftStep], None]
) -> Sequence[SdftStep]:
    from tinker import types

    renderer = policy.renderer
    return await train_sdft(
        policy.backend,
        build_lessons(rows, lambda messages, tools: renderer.render([dict(message) for message in messages], tools)),
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=_rate(config, policy.backend),
        sampling=types.SamplingParams(max_tokens=policy.config.max_tokens),
        candidates=config.candidates,
        seed=config.seed,
        on_step=on_step,
    )
