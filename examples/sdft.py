"""Self-distillation finetuning in 30 lines: python examples/sdft.py [base model]

The student sees a question, the teacher (the same model) the question with a demonstration. The student learns to
predict what the teacher predicts. The tiny builtin model knows no language, so here the reverse KL to the teacher is
all there is to watch; a model that follows its context learns the demonstrations' manner.
"""

import asyncio
import sys
from pathlib import Path
from tempfile import mkdtemp

from tinker import types

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.training.sdft import build_lessons, train_sdft

DEMONSTRATIONS = {"What is 7 + 5?": "7 + 5 makes 12.", "What is 3 times 9?": "3 times 9 makes 27."}


async def main(base_model: str = "builtin/tiny") -> None:
    backend = await LocalBackend.create(base_model, rank=8, checkpoint_dir=Path(mkdtemp()))
    renderer = ChatRenderer(backend.get_tokenizer())
    examples = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in DEMONSTRATIONS.items()
    ]
    await train_sdft(
        backend,
        build_lessons(examples, renderer.render),
        epochs=15,
        batch_size=2,
        learning_rate=5e-3,
        sampling=types.SamplingParams(max_tokens=16),
        candidates=256,
        on_step=lambda s: print(f"{s.step:2}/{s.total_steps}  reverse KL {s.loss:.4f}  tail {s.tail_mass:.2f}"),
    )
    await backend.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
