"""A verifiers environment trains the policy in this process: verifiers calls the policy endpoint, no server runs.

verifiers_local.py PYTHON MODEL STEPS: PYTHON has verifiers, MODEL is a directory. Prints a JSON line for each
training step, up to STEPS of them, fewer if the reward has risen by 0.4 before.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from tinker import types

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.rollouts.token_records import recorded_call
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.policy_gradient import TrainingSettings
from nat_plugin_evsys.training.rl import train_groups


def calls_of(branch: dict[str, Any]) -> Iterator[Call]:
    """A call for each run of sampled tokens: what stands before it is what the policy read."""
    ids, logprobs = branch["token_ids"], branch["logprobs"]
    for sampled, run in groupby(range(len(ids)), key=branch["sampled"].__getitem__):
        places = list(run)
        if sampled:
            start, end = places[0], places[-1] + 1
            yield recorded_call(ids[:start], ids[start:end], logprobs[start:end], sequence=start)


async def roll_out(python: Path, policy: Policy) -> list[list[dict[str, Any]]]:
    """Of each task its rollouts, by verifiers in its own environment."""
    program = Path(__file__).with_name("verifiers_rollouts.py")
    place = (policy.endpoint.base_url, policy.config.base_model, policy.config.base_model)
    environment = {**os.environ, "TINKER_API_KEY": policy.endpoint.api_key}
    environment.pop("PYTHONPATH", None)
    process = await asyncio.create_subprocess_exec(
        python, "-W", "ignore", program, *place, env=environment, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output[-4000:]
    return [json.loads(line) for line in output.splitlines() if line.startswith(b"[")]


async def main(python: Path, base_model: str, steps: int) -> None:
    policy = Policy.of(EvsysPolicyConfig(base_model=base_model, checkpoint="none", lora_rank=16, train_unembed=True))
    await policy.ensure_loaded()
    settings = TrainingSettings("importance_sampling", types.AdamParams(learning_rate=1e-2))
    means: list[float] = []
    for step in range(steps):
        tasks = await roll_out(python, policy)
        groups = [
            TrajectoryGroup(
                name=f"task {at}",
                rewards_G=[trace["reward"] for trace in task],
                calls_G=[[call for branch in trace["branches"] for call in calls_of(branch)] for trace in task],
            )
            for at, task in enumerate(tasks)
        ]
        taken, dropped = await train_groups(policy.backend, groups, settings)
        await policy.publish()
        rewards = [reward for group in groups for reward in group.rewards_G]
        means.append(statistics.fmean(rewards))
        figures = {"step": step, "reward": means[-1], "rollouts": len(rewards)}
        calls = sum(len(calls) for group in groups for calls in group.calls_G)
        ratio = taken[0]["ratio:mean"] if taken else None
        print(json.dumps({**figures, "calls": calls, "ratio": ratio, "left out": dict(dropped)}), flush=True)
        if step > 2 and means[-1] > means[0] + 0.4:
            break
    await policy.close()


asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
