"""Direct preference optimisation in 30 lines: python examples/dpo.py [base model]

The preferences are NAT's DPOItem, as the trajectories of a DPO trajectory builder carry them.
"""

import asyncio
import sys
from pathlib import Path
from tempfile import mkdtemp

from nat.data_models.finetuning import DPOItem

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.training.dpo import build_dpo_pairs, train_dpo

ITEMS = [
    DPOItem(prompt="Say hello.", chosen_response="Hello, how can I help?", rejected_response="What do you want?"),
    DPOItem(prompt="Say goodbye.", chosen_response="Goodbye, have a good day.", rejected_response="Go away."),
    DPOItem(prompt="Say thanks.", chosen_response="Thank you very much.", rejected_response="Finally."),
]


async def main(base_model: str = "builtin/tiny") -> None:
    backend = await LocalBackend.create(base_model, rank=8, checkpoint_dir=Path(mkdtemp()))
    renderer = ChatRenderer(backend.get_tokenizer())
    await train_dpo(
        backend,
        build_dpo_pairs(ITEMS, renderer.render, renderer.render_reply),
        epochs=10,
        batch_size=3,
        learning_rate=2e-3,
        beta=0.1,
        on_step=lambda s: print(
            f"{s.step:2}/{s.total_steps}  loss {s.loss:.4f}  margin {s.margin:.3f}  accuracy {s.accuracy:.2f}"
        ),
    )
    print("saved", await backend.save_for_sampler("polite"))
    await backend.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
