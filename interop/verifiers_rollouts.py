"""verifiers rolls out its letters environment against an endpoint; run in verifiers' environment.

verifiers_rollouts.py URL MODEL TOKENIZER: URL ends in /v1, its key is in TINKER_API_KEY, TOKENIZER is a model's
directory. Prints a JSON line for each task: of each attempt the reward and the branches, as verifiers recorded them.
"""

from __future__ import annotations

import asyncio
import json
import sys

import verifiers.v1 as vf

GROUP_SIZE = 8
LETTERS = "verifiers_letters"


def letters() -> vf.Taskset:
    return vf.load_taskset(vf.taskset_config_type(LETTERS)(id=LETTERS))


def agent_config(url: str, model: str, tokenizer: str) -> vf.AgentConfig:
    """The agent whose train client renders and posts token ids."""
    return vf.AgentConfig(
        harness={"id": LETTERS},
        runtime=vf.SubprocessConfig(),
        model=model,
        client=vf.TrainClientConfig(base_url=url, api_key_var="TINKER_API_KEY", renderer_model_name=tokenizer),
        sampling={"temperature": 1.0, "max_tokens": 16},
    )


async def roll_out_all(config: vf.AgentConfig, taskset: vf.Taskset) -> list[list[vf.Trace]]:
    """A group of rollouts for each task."""
    async with vf.make_agent(config) as agent:
        runs = [asyncio.gather(*(agent.run(task) for _ in range(GROUP_SIZE))) for task in taskset]
        groups = [list(await each) for each in runs]
    for trace in (trace for group in groups for trace in group):
        assert trace.ok, trace.errors
    return groups


def shown(trace: vf.Trace) -> dict[str, object]:
    branches = [
        {
            "token_ids": list(each.token_ids),
            "sampled": list(map(bool, each.sampled_mask)),
            "logprobs": list(each.logprobs),
        }
        for each in trace.branches
    ]
    return {"reward": trace.reward, "turns": trace.num_turns, "branches": branches}


if __name__ == "__main__":
    for group in asyncio.run(roll_out_all(agent_config(*sys.argv[1:]), letters())):
        print(json.dumps([shown(trace) for trace in group]))
