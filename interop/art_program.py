"""An ART program: a model learns to write small letters, on the Tinker service at TINKER_BASE_URL.

art_program.py MODEL DIRECTORY STEPS: prints a JSON line of the policy, one for each training step, and one of the
policy it has then. It goes on from the run that DIRECTORY holds. Nothing in it is about nat_plugin_evsys.
"""

import asyncio
import json
import sys

import art
from art.tinker_native import TinkerNativeBackend
from art_policy import greedy_logprobs

QUESTIONS = ("Hello?", "Who is there?", "What do you see?", "And then?")
GROUP_SIZE = 8


async def rollout(model: art.TrainableModel, question: str) -> art.Trajectory:
    """One reply, rewarded for its share of small letters. ART records what the client is answered."""

    async def ask() -> str:
        completion = await model.openai_client().chat.completions.create(
            model=model.get_inference_name(), messages=[{"role": "user", "content": question}], max_tokens=16
        )
        return completion.choices[0].message.content or ""

    async def attempt() -> None:
        text = await ask()
        trajectory = art.auto_trajectory(required=True)
        trajectory.reward = sum(letter.islower() for letter in text) / max(1, len(text))

    return await art.capture_auto_trajectory(attempt())


async def main(base_model: str, directory: str, steps: int) -> None:
    model = art.TrainableModel(
        name="letters",
        project="interop",
        base_model=base_model,
        base_path=directory,
        _internal_config={"tinker_native_args": {"renderer_name": "role_colon"}},
    )
    backend = TinkerNativeBackend(path=directory)
    await model.register(backend)
    print(json.dumps({"greedy": await greedy_logprobs(model, QUESTIONS[0])}), flush=True)
    for _ in range(steps):
        groups = await art.gather_trajectory_groups(
            art.TrajectoryGroup(rollout(model, question) for _ in range(GROUP_SIZE)) for question in QUESTIONS
        )
        rewards = [trajectory.reward for group in groups for trajectory in group]
        result = await backend.train(model, groups, learning_rate=1e-2, save_checkpoint=True)
        figures = {"step": result.step, "reward": sum(rewards) / len(rewards), "rollouts": len(rewards)}
        print(json.dumps({**figures, "ratio": result.metrics.get("ratio:mean")}), flush=True)
    print(json.dumps({"greedy": await greedy_logprobs(model, QUESTIONS[0])}), flush=True)
    await backend.close()


asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
