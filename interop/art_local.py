"""An ART program on the embedded engine: a model learns to write the letters a to m, in this process.

art_local.py MODEL DIRECTORY STEPS: prints a JSON line of the policy, one for each training step, and one of the policy
it has then. It goes on from the run that DIRECTORY holds.
"""

import asyncio
import json
import sys

import art
from art_policy import greedy_logprobs

from nat_plugin_evsys.art import LocalBackend

QUESTIONS = ("Hello?", "Who is there?", "What do you see?", "And then?")
GROUP_SIZE = 8


async def rollout(model: art.TrainableModel, question: str) -> art.Trajectory:
    """One reply, rewarded for its share of the letters a to m."""
    messages = [{"role": "user", "content": question}]
    completion = await model.openai_client().chat.completions.create(
        model=model.get_inference_name(), messages=messages, max_tokens=16
    )
    choice = completion.choices[0]
    text = choice.message.content or ""
    reward = sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text))
    return art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)


async def main(base_model: str, directory: str, steps: int) -> None:
    model = art.TrainableModel(name="letters", project="interop", base_model=base_model, base_path=directory)
    backend = LocalBackend(path=directory)
    await model.register(backend)
    print(json.dumps({"greedy": await greedy_logprobs(model, QUESTIONS[0])}), flush=True)
    for _ in range(steps):
        groups = await art.gather_trajectory_groups(
            art.TrajectoryGroup(rollout(model, question) for _ in range(GROUP_SIZE)) for question in QUESTIONS
        )
        rewards = [trajectory.reward for group in groups for trajectory in group]
        result = await backend.train(model, groups, learning_rate=1e-2)
        figures = {"step": result.step, "reward": sum(rewards) / len(rewards), "rollouts": len(rewards)}
        print(json.dumps({**figures, "ratio": result.metrics.get("ratio:mean")}), flush=True)
    print(json.dumps({"greedy": await greedy_logprobs(model, QUESTIONS[0])}), flush=True)
    await backend.close()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
