"""A verifiers environment trains a policy on ``nat evsys serve``: its train client samples, tinker's SDK trains.

verifiers_program.py MODEL STEPS: MODEL is a directory that the server at TINKER_BASE_URL serves too. Prints a JSON
line for each training step, up to STEPS of them, fewer if the reward has risen by 0.4 before. Nothing in it is about
nat_plugin_evsys.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys

import tinker
import verifiers.v1 as vf
from tinker import types
from tinker_figures import distance
from verifiers_rollouts import agent_config, letters, roll_out_all


def datum(branch: vf.Branch, advantage: float) -> types.Datum:
    """A branch of a trace as verifiers recorded it: the tokens that the policy read and sampled."""
    sampled = branch.sampled_mask[1:]
    inputs = {
        "target_tokens": branch.token_ids[1:],
        "logprobs": branch.logprobs[1:],
        "advantages": [advantage * each for each in sampled],
    }
    return types.Datum(model_input=types.ModelInput.from_ints(branch.token_ids[:-1]), loss_fn_inputs=inputs)


def datums_of(group: list[vf.Trace]) -> list[types.Datum]:
    """Each rollout against the mean of its group."""
    mean = statistics.fmean(trace.reward for trace in group)
    return [datum(branch, trace.reward - mean) for trace in group for branch in trace.branches]


async def main(base_model: str, steps: int) -> None:
    client = tinker.ServiceClient()
    training = await client.create_lora_training_client_async(base_model, rank=16)
    run = training.get_info().model_id
    taskset, url = letters(), f"{os.environ['TINKER_BASE_URL']}/v1"
    config = agent_config(url, run, base_model)  # the newest weights that the run has saved for sampling
    rewards: list[float] = []
    for step in range(steps):
        await (await training.save_weights_for_sampler_async(f"step-{step}")).result_async()
        groups = await roll_out_all(config, taskset)
        data = [each for group in groups for each in datums_of(group)]
        output = await (await training.forward_backward_async(data, "importance_sampling")).result_async()
        await (await training.optim_step_async(types.AdamParams(learning_rate=1e-2))).result_async()
        traces = [trace for group in groups for trace in group]
        rewards.append(statistics.fmean(trace.reward for trace in traces))
        figures = {"step": step, "reward": rewards[-1], "rollouts": len(traces), "turns": traces[0].num_turns}
        print(json.dumps({**figures, "datums": len(data), "distance": distance(data, output)}), flush=True)
        if step > 2 and rewards[-1] > rewards[0] + 0.4:
            break
    await (await training.save_weights_for_sampler_async("last")).result_async()
    chat = config.model_copy(update={"client": vf.EvalClientConfig(base_url=url, api_key_var="TINKER_API_KEY")})
    evaluated = [trace.reward for group in await roll_out_all(chat, taskset) for trace in group]
    print(json.dumps({"evaluated": statistics.fmean(evaluated)}))


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
