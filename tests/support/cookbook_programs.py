"""Programs of tinker-cookbook: how each is called, and what it must have reported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KL_BOUND = 1e-3
"""Of sampler against trainer, in nats a token."""

Steps = list[dict[str, Any]]


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        options: its own, beside those that all take.
        check: asserts on its metrics, one mapping for each step, and gives the line to print.
        model: which of the served models it trains.
        checkpoint: (option, program, which path): starts with what another program saved.
        resumes: goes on in the log directory of that program.
    """

    name: str
    module: str
    options: dict[str, Any]
    check: Callable[[Steps], str]
    model: str = "smollm2"
    checkpoint: tuple[str, str, str] | None = None
    resumes: str | None = None
    common: dict[str, Any] = field(default_factory=lambda: {"eval_every": 0, "save_every": 0})

    @property
    def renderer(self) -> str:
        """SmolLM2 has the chat format of Qwen's instruct models; the toy model has none."""
        return "qwen3_instruct" if self.model == "smollm2" else "role_colon"


def series(steps: Steps, key: str) -> list[float]:
    return [step[key] for step in steps if key in step]


def falls(steps: Steps, key: str, factor: float, count: int) -> str:
    """The metric of the last step is below ``factor`` times that of the first."""
    values = series(steps, key)
    assert len(values) == count, values
    assert values[-1] < factor * values[0], values
    return f"{key} {values[0]:.3f} at the first of {count} steps, {values[-1]:.3f} at the last"


def agrees(steps: Steps, count: int) -> str:
    """At each step the sampler's and the trainer's logprobs agree."""
    values = series(steps, "optim/kl_sample_train_v1")
    assert len(values) == count, values
    assert all(abs(value) < KL_BOUND for value in values), values
    return f"optim/kl_sample_train_v1 at most {max(map(abs, values)):.1e} in {count} steps"


def check_rl(steps: Steps, count: int) -> str:
    """The agreement shows something only if the updates moved the policy by far more than the two differ."""
    line = agrees(steps, count)
    for step in steps[:count]:
        apart, moved = (math.sqrt(2 * step[key]) for key in ("optim/kl_sample_train_v2", "kl_pre_post_v2"))
        assert moved > max(10 * apart, KL_BOUND), (moved, apart)
        assert step["env/all/by_group/frac_mixed"] > 0
    rewards = series(steps, "env/all/reward/total")
    return f"{line}; rms that an update moved {moved:.1e}; reward {rewards[0]:+.3f} to {rewards[-1]:+.3f}"


def check_guess_number(steps: Steps) -> str:
    """Ten turns an episode: every later turn is sampled after replies that were sampled before."""
    turns = series(steps, "env/all/turns_per_episode")
    assert max(turns) > 5, turns
    rewards = series(steps, "env/all/reward/total")
    return f"{agrees(steps, 2)}; {max(turns):.0f} turns an episode; reward {rewards[0]:+.2f}, {rewards[-1]:+.2f}"


def check_dpo(steps: Steps) -> str:
    """Before the first step the policy is the reference, so that the sampler's logprobs cancel the trainer's."""
    assert abs(steps[0]["margin"]) < KL_BOUND, steps[0]
    assert math.isclose(steps[0]["dpo_loss"], math.log(2), abs_tol=KL_BOUND)
    assert series(steps, "accuracy")[-1] == 1.0
    return f"margin {steps[0]['margin']:+.1e} at the start; {falls(steps, 'dpo_loss', 0.5, 6)}"


def check_on_policy(steps: Steps) -> str:
    return f"{falls(steps, 'teacher_kl', 0.7, 5)}; {agrees(steps, 5)}"


def math_rl(name: str, steps: int, resumes: str | None = None) -> Program:
    options = {"env": "arithmetic", "loss_fn": "importance_sampling", "group_size": 8, "groups_per_batch": 8}
    options |= {"max_tokens": 12, "learning_rate": 5e-4, "compute_post_kl": True, "max_steps": steps}
    return Program(
        name,
        "recipes.math_rl.train",
        options,
        lambda found: check_rl(found, steps),
        model="tiny",
        checkpoint=("load_checkpoint_path", "chat_sl", "state_path"),
        resumes=resumes,
        common={"eval_every": 0, "save_every": 1},
    )


PROGRAMS = (
    Program(
        "chat_sl",
        "recipes.chat_sl.train",
        {"dataset": "chat.jsonl", "batch_size": 16, "max_steps": 40, "num_epochs": 1, "learning_rate": 2e-3}
        | {"lr_schedule": "constant", "max_length": 256},
        lambda steps: falls(steps, "train_mean_nll", 0.5, 40),
        model="tiny",
    ),
    math_rl("math_rl", 3),
    math_rl("math_rl resumed", 5, resumes="math_rl"),
    Program(
        "guess_number",
        "recipes.multiplayer_rl.guess_number.train",
        {"group_size": 4, "batch_size": 2, "max_tokens": 8, "learning_rate": 1e-3, "max_steps": 2},
        check_guess_number,
    ),
    Program(
        "dpo",
        "recipes.preference.dpo.train",
        {"dataset": "hhh", "batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "lr_schedule": "constant"}
        | {"max_length": 128},
        check_dpo,
        common={},
    ),
    Program(
        "on_policy_distillation",
        "recipes.distillation.on_policy_distillation",
        {"dataset": "deepmath", "group_size": 4, "groups_per_batch": 4, "learning_rate": 5e-4, "max_steps": 5}
        | {"lora_rank": 32, "max_tokens": 16},
        check_on_policy,
        checkpoint=("teacher_checkpoint", "dpo", "sampler_path"),
    ),
    Program(
        "sdft",
        "recipes.sdft.train",
        {"dataset": "sciknoweval", "groups_per_batch": 8, "group_size": 1, "learning_rate": 1e-3, "topk": 20}
        | {"reverse": True, "max_context_length": 1024, "max_steps": 4, "lora_rank": 32, "max_tokens": 12},
        lambda steps: falls(steps, "sdft/reverse_kl_mean", 0.85, 4),
    ),
    Program(
        "prompt_distillation",
        "recipes.prompt_distillation.train",
        {"file_path": "languages.jsonl", "batch_size": 8, "max_steps": 6, "learning_rate": 5e-4, "max_length": 256},
        lambda steps: falls(steps, "train_mean_nll", 0.5, 6),
    ),
)
