"""Supervised finetuning in 30 lines: python examples/sft.py [base model]

The tiny builtin model, which knows nothing, learns four capitals by heart.
"""

import asyncio
import sys
from pathlib import Path
from tempfile import mkdtemp

from tinker import types

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.training.sft import build_sft_datums, train_sft

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Egypt": "Cairo"}


async def main(base_model: str = "builtin/tiny") -> None:
    backend = await LocalBackend.create(base_model, rank=8, checkpoint_dir=Path(mkdtemp()))
    renderer = ChatRenderer(backend.get_tokenizer())
    questions = {c: [{"role": "user", "content": f"What is the capital of {c}?"}] for c in CAPITALS}
    examples = [{"messages": [*questions[c], {"role": "assistant", "content": CAPITALS[c]}]} for c in CAPITALS]
    datums = build_sft_datums(examples, renderer.render, renderer.render_reply)
    steps = await train_sft(backend, datums, epochs=30, batch_size=4, learning_rate=1e-2)
    print(f"loss per token {steps[0].loss:.3f} -> {steps[-1].loss:.3f}")
    client = await backend.snapshot_sampling_client()
    for country in CAPITALS:
        prompt = types.ModelInput.from_ints(renderer.render(questions[country]))
        greedy = types.SamplingParams(max_tokens=8, temperature=0)
        reply = (await client.sample_async(prompt, 1, greedy)).sequences[0]
        print(country, "->", renderer.parse(reply.tokens).content)
    await backend.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
