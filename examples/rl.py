"""Reinforcement learning in 30 lines: python examples/rl.py [base model]

The tiny builtin model, which knows nothing, learns to answer in vowels. The reward of a reply is the share of its
characters that are vowels.
"""

import asyncio
import sys
from pathlib import Path
from tempfile import mkdtemp

from tinker import types

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.training.policy_gradient import TrainingSettings
from nat_plugin_evsys.training.rl import train_rl


async def main(base_model: str = "builtin/tiny") -> None:
    backend = await LocalBackend.create(base_model, rank=8, train_unembed=True, checkpoint_dir=Path(mkdtemp()))
    renderer = ChatRenderer(backend.get_tokenizer())
    await train_rl(
        backend,
        ["What is 7 + 5?", "How many days has May?", "Which year is it?", "What is 3 times 9?"],
        render=lambda question: renderer.render([{"role": "user", "content": question}]),
        reward=lambda question, reply: sum(c in "aeiou" for c in reply) / max(len(reply), 1),
        settings=TrainingSettings("importance_sampling", types.AdamParams(learning_rate=5e-3)),
        epochs=16,
        batch_size=4,
        group_size=16,
        sampling=types.SamplingParams(max_tokens=8),
        on_iteration=lambda i, groups: print(f"{i.iteration:2}/{i.total_iterations}  reward {i.reward_mean:.3f}"),
    )
    print("saved", await backend.save_for_sampler("vowels"))
    await backend.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
