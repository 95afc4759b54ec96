"""A NeMo Gym environment trains the policy: reasoning-gym's letter counting, verified by Gym, on the embedded engine.

gym_program.py GYM MODEL DIRECTORY STEPS: GYM is the directory of an environment's programs that has nemo-gym. Prints a
JSON line for each training step. Gym's servers run as Gym starts them; nothing of Gym is imported here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from tinker import types

from nat_plugin_evsys.config import EvsysPolicyConfig
from nat_plugin_evsys.policy.policy import Policy
from nat_plugin_evsys.rollouts.token_records import gym_group
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.policy_gradient import TrainingSettings
from nat_plugin_evsys.training.rl import train_groups

HEAD = "http://127.0.0.1:11000"
AGENT = "reasoning_gym_simple_agent"
CONFIGS = "environments/reasoning_gym/config.yaml,responses_api_models/vllm_model/configs/vllm_model_for_training.yaml"
SERVERS = ("resources_servers/reasoning_gym", "responses_api_agents/simple_agent", "responses_api_models/vllm_model")
SYSTEM = {"role": "system", "content": "Answer with one number, such as 2, and nothing else."}
SAMPLING = {"temperature": 1.0, "max_output_tokens": 8}
GROUP_SIZE = 8


def make_rows(gym: Path, directory: Path) -> list[dict[str, Any]]:
    """Tasks, by Gym's own script."""
    (site,) = gym.parent.glob("lib/python3*/site-packages")
    script = site / "environments/reasoning_gym/scripts/create_dataset.py"
    output = directory / "rows.jsonl"
    options = ["--task", "letter_counting", "--size", "16", "--seed", "1", "--output", str(output)]
    options += ["--config", json.dumps({"min_words": 2, "max_words": 4})]
    subprocess.run([str(gym / "python"), str(script), *options], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in output.read_text().splitlines()]


@asynccontextmanager
async def gym_servers(gym: Path, directory: Path, policy: Policy) -> AsyncIterator[str]:
    """Gym's servers, in Gym's environment instead of one for each of them; gives the URL of the agent."""
    for server in SERVERS:
        place = directory / "environments" / server / ".venv"
        place.parent.mkdir(parents=True)
        place.symlink_to(gym.parent)
    options = [
        f"+config_paths=[{CONFIGS}]",
        f"+policy_base_url={policy.endpoint.base_url}",
        f"+policy_api_key={policy.endpoint.api_key}",
        f"+policy_model_name={policy.config.base_model}",
        f"+uv_venv_dir={directory / 'environments'}",
        "+skip_venv_if_present=true",
    ]
    environment = {**os.environ, "PATH": f"{gym}:{os.environ['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("PYTHONPATH", None)
    # Gym ends at SIGINT, which it would ignore where this program was started in the background of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (directory / "gym.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            gym / "gym", "env", "start", *options, env=environment, cwd=directory, stdout=log, stderr=log
        )
    try:
        while "All 3 / 3 servers ready" not in (written := (directory / "gym.log").read_text()):
            assert process.returncode is None, written[-4000:]
            await asyncio.sleep(1)
        async with httpx.AsyncClient() as client:
            known = yaml.safe_load((await client.get(f"{HEAD}/global_config_dict_yaml")).json())
        agent = known[AGENT]["responses_api_agents"]["simple_agent"]
        yield f"http://{agent['host']}:{agent['port']}"
    finally:
        process.send_signal(signal.SIGINT)
        await process.wait()


async def roll_out(client: httpx.AsyncClient, agent: str, row: dict[str, Any], name: str) -> TrajectoryGroup:
    """All attempts at a task, as Gym's agent makes them and its verifier rewards them."""
    asked = [SYSTEM, *row["responses_create_params"]["input"]]
    body = {**row, "responses_create_params": {"input": asked, **SAMPLING}}
    answers = await asyncio.gather(*(client.post(f"{agent}/run", json=body) for _ in range(GROUP_SIZE)))
    return gym_group([answer.raise_for_status().json() for answer in answers], name)


async def main(gym: Path, base_model: str, directory: Path, steps: int) -> None:
    policy = Policy.of(EvsysPolicyConfig(base_model=base_model, checkpoint="none", lora_rank=16))
    await policy.ensure_loaded()
    settings = TrainingSettings("importance_sampling", types.AdamParams(learning_rate=5e-4, grad_clip_norm=1.0))
    rows = make_rows(gym, directory)
    async with gym_servers(gym, directory, policy) as agent, httpx.AsyncClient(timeout=600) as client:
        for step in range(steps):
            groups = await asyncio.gather(*(roll_out(client, agent, row, f"task {at}") for at, row in enumerate(rows)))
            taken, dropped = await train_groups(policy.backend, groups, settings)
            await policy.publish()
            reward = statistics.fmean(value for group in groups for value in group.rewards_G)
            figures = {"step": step, "reward": reward, "rollouts": len(rows) * GROUP_SIZE, "left out": dict(dropped)}
            print(json.dumps({**figures, "ratio": taken[0]["ratio:mean"] if taken else None}), flush=True)
    await policy.close()


asyncio.run(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
