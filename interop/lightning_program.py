"""An algorithm for Agent Lightning: its server, its proxy and its runners, and tinker's SDK on ``nat evsys serve``.

lightning_program.py MODEL DIRECTORY STEPS: MODEL is what the server at TINKER_BASE_URL serves. Prints a JSON line for
each training step. Nothing in it is about nat_plugin_evsys.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import tinker
from agentlightning.client import AgentLightningAsyncClient
from tinker import types
from tinker_figures import distance

QUESTIONS = ("Hello?", "What do you see?")
GROUP_SIZE = 8
KEY = "lightning"
AGENT = {"agent_class": "lightning_agent:LettersAgent", "env_map": {"QUESTION": "input.question"}}


@asynccontextmanager
async def part(name: str, directory: Path, *options: str) -> AsyncIterator[None]:
    """Agent Lightning's server or controller, while the block runs."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", f"agentlightning.{name}", *options, f"hydra.run.dir={directory / name}"]
    with (directory / f"{name}.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.terminate()
        await process.wait()


async def roll_out_all(api: httpx.AsyncClient) -> list[list[list[dict[str, Any]]]]:
    """A group of rollouts for each question; of each rollout its events, as Agent Lightning gives them to trainers."""
    asked = [{"input": {"question": question}, "config": {"local": AGENT}} for question in QUESTIONS]
    body = [each for each in asked for _ in range(GROUP_SIZE)]
    rollouts = [each["rollout_id"] for each in (await api.post("/api/rollouts", json=body)).raise_for_status().json()]
    waiting = set(rollouts)
    while waiting:
        await asyncio.sleep(0.5)
        for rollout in list(waiting):
            status = (await api.get(f"/api/rollouts/{rollout}")).raise_for_status().json()["rollout"]["status"]
            assert status["state"] != "failed", status
            waiting -= {rollout} if status["state"] == "succeeded" else set()
    told = [await api.get(f"/api/rollouts/{rollout}/events", params={"format": "triplet"}) for rollout in rollouts]
    events = [each.raise_for_status().json() for each in told]
    return [events[start : start + GROUP_SIZE] for start in range(0, len(events), GROUP_SIZE)]


def reward_of(events: list[dict[str, Any]]) -> float:
    return sum(each["data"]["value"] for each in events if each["event_type"] == "reward")


def datums_of(group: list[list[dict[str, Any]]]) -> list[types.Datum]:
    """A Datum for each call, with the tokens that the proxy recorded; each rollout against the mean of its group."""
    mean = statistics.fmean(map(reward_of, group))
    return [
        datum(each["data"], reward_of(events) - mean)
        for events in group
        for each in events
        if each["event_type"] == "model_request"
    ]


def datum(call: dict[str, Any], advantage: float) -> types.Datum:
    prompt, reply, logprobs = call["prompt_token_ids"], call["response_token_ids"], call["response_log_probs"]
    before = [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": [*prompt, *reply][1:],
        "logprobs": before + logprobs,
        "advantages": before + [advantage] * len(reply),
    }
    return types.Datum(model_input=types.ModelInput.from_ints([*prompt, *reply][:-1]), loss_fn_inputs=inputs)


async def main(base_model: str, directory: Path, steps: int) -> None:
    training = await tinker.ServiceClient().create_lora_training_client_async(base_model, rank=16)
    run = training.get_info().model_id  # as a model, the newest weights that the run has saved for sampling
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    async with AsyncExitStack() as parts:
        options = ("host=127.0.0.1", f"port={port}", f"key={KEY}", f"default_proxy.model_name='{run}'")
        await parts.enter_async_context(part("server", directory, *options))
        api = await parts.enter_async_context(AgentLightningAsyncClient(base_url=url, key=KEY, timeout=60))
        while True:
            try:
                (await api.get("/healthz")).raise_for_status()
                break
            except httpx.TransportError:
                await asyncio.sleep(0.5)
        await api.post("/api/models", json=[{"model": run, "endpoint": f"{os.environ['TINKER_BASE_URL']}/v1"}])
        runner = ("runner_type=local", f"agl_server.url={url}", f"agl_server.key={KEY}")
        pool = ("local_runner.poll_interval=1", "local_runner.maximum_size=4")
        await parts.enter_async_context(part("controller", directory, *runner, *pool))
        for step in range(steps):
            await (await training.save_weights_for_sampler_async(f"step-{step}")).result_async()
            groups = await roll_out_all(api)
            data = [each for group in groups for each in datums_of(group)]
            output = await (await training.forward_backward_async(data, "importance_sampling")).result_async()
            await (await training.optim_step_async(types.AdamParams(learning_rate=1e-2))).result_async()
            rewards = [reward_of(events) for group in groups for events in group]
            figures = {"step": step, "reward": statistics.fmean(rewards), "rollouts": len(rewards)}
            print(json.dumps({**figures, "calls": len(data), "distance": distance(data, output)}), flush=True)


asyncio.run(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
