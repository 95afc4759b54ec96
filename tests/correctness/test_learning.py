"""It learns, and as an independent plain-PyTorch run does: the same losses at every step, the same level at the end.

The plain runs share no code with the engine: transformers' own forward pass, LoRA by ``peft``, losses written out here,
``torch.optim.AdamW``, sampling by ``torch.multinomial``. What they are given is data: the starting LoRA matrices (the
product's PEFT directory of step 0) and the seeds. Supervised finetuning shuffles the same rows by the same seed.
Reinforcement learning replays the replies that the product sampled, with their recorded logprobs and rewards, so that
both train on the same tokens; a second plain run then samples its own replies.

Both sides compute in float32 and round differently, and training amplifies the difference: with learning rates above
1e-2 on models this small it grows tenfold every few steps. The rates here are those at which the tasks are learnt well.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from tinker import types
from tiny import save_byte_model
from transformers import AutoModelForCausalLM

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.rollouts.trajectories import TrajectoryGroup
from nat_plugin_evsys.training.policy_gradient import TrainingSettings
from nat_plugin_evsys.training.rl import RlIteration, train_rl
from nat_plugin_evsys.training.sft import reply_datum, train_sft

TOLERANCE = 1e-3
END, ASK, SAY = 256, 257, 258
SEED, RATE = 5, 5e-3


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with one token per byte."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "head_dim": 12, "initializer_range": 0.1}
    special = ("<|end|>", "<|ask|>", "<|say|>")
    return save_byte_model(tmp_path_factory.mktemp("learning") / "model", special=special, **shape)


@pytest.fixture
async def backend(byte_model: Path, tmp_path: Path) -> AsyncIterator[LocalBackend]:
    made = await LocalBackend.create(
        str(byte_model), rank=8, device="cpu", checkpoint_dir=tmp_path, seed=SEED, train_unembed=True
    )
    yield made
    await made.close()


# -- the plain side: nothing of the engine below this line until the tests ---------------------------------------------


class PlainRun:
    """A PEFT model with torch's AdamW."""

    def __init__(self, model_dir: Path, adapter_dir: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, adapter_dir, is_trainable=True).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.parameters, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def reply_logprobs(self, prompt: Sequence[int], replies: Sequence[Sequence[int]]) -> torch.Tensor:
        """(R, T) log-probabilities of the tokens of R replies of one length; no padding anywhere."""
        logits = self.model(input_ids=torch.tensor([[*prompt, *reply] for reply in replies])).logits
        rows = torch.log_softmax(logits[:, len(prompt) - 1 : -1], dim=-1)
        return torch.gather(rows, 2, torch.tensor(replies)[:, :, None])[:, :, 0]

    def step(self, loss: torch.Tensor, learning_rate: float) -> float:
        """One AdamW step; returns the gradient's norm."""
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None]).norm().item()
        self.adamw.step()
        return norm

    @torch.no_grad()
    def sample(
        self, prompt: Sequence[int], count: int, length: int, generator: torch.Generator | None
    ) -> list[list[int]]:
        """``count`` replies of exactly ``length`` tokens; greedy without a generator."""
        ids = torch.tensor([list(prompt)] * count)
        for _ in range(length):
            logits = self.model(input_ids=ids).logits[:, -1]
            if generator is None:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
            ids = torch.cat([ids, token], dim=1)
        return ids[:, len(prompt) :].tolist()


CAPITALS = {
    "france": "paris",
    "japan": "tokyo",
    "peru": "lima",
    "egypt": "cairo",
    "chile": "santiago",
    "cuba": "havana",
}


def capital_ids() -> list[tuple[list[int], list[int]]]:
    return [([ASK, *country.encode(), SAY], [*city.encode(), END]) for country, city in CAPITALS.items()]


def plain_sft(run: PlainRun, rows: Sequence[Any], epochs: int, batch_size: int, rate: float, seed: int) -> list[float]:
    """Mean loss per reply token at each step; the rate falls linearly to zero."""
    order_source, losses = random.Random(seed), []
    total = epochs * -(-len(rows) // batch_size)
    for _ in range(epochs):
        order = list(range(len(rows)))
        order_source.shuffle(order)
        while order:
            batch, order = [rows[i] for i in order[:batch_size]], order[batch_size:]
            nll = -torch.cat([run.reply_logprobs(prompt, [reply])[0] for prompt, reply in batch])
            now = rate * (total - len(losses)) / total
            losses.append(nll.detach().mean().item())
            run.step(nll.sum(), now)
    return losses


class Group(NamedTuple):
    """R replies to one prompt, all of LENGTH tokens, with their logprobs when they were sampled and their rewards."""

    prompt: list[int]
    replies: list[list[int]]
    logprobs: list[list[float]]
    rewards: list[float]


def plain_ppo_loss(run: PlainRun, groups: Sequence[Group]) -> torch.Tensor:
    """Sum over groups, replies and tokens of -min(r A, clip(r, 0.8, 1.2) A), with A = reward - the group's mean."""
    terms = []
    for prompt, replies, sampled, rewards in groups:
        ratio = (run.reply_logprobs(prompt, replies) - torch.tensor(sampled)).exp()
        advantage = (torch.tensor(rewards) - sum(rewards) / len(rewards))[:, None]
        terms.append(-torch.minimum(ratio * advantage, ratio.clip(0.8, 1.2) * advantage).sum())
    return torch.stack(terms).sum()


def plain_rl(run: PlainRun, prompts: Sequence[list[int]]) -> None:
    """ITERATIONS of sampling and PASSES steps, on samples of its own."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(ITERATIONS):
        groups = []
        for prompt in prompts:
            replies = run.sample(prompt, GROUP, LENGTH, generator)
            with torch.no_grad():
                logprobs = run.reply_logprobs(prompt, replies).tolist()
            groups.append(Group(prompt, replies, logprobs, [reward_of(reply) for reply in replies]))
        for _ in range(PASSES):
            run.step(plain_ppo_loss(run, groups), RATE)


def plain_level(run: PlainRun, prompts: Sequence[Sequence[int]], count: int = 64) -> float:
    """Mean reward of ``count`` freshly sampled replies to each prompt."""
    generator = torch.Generator().manual_seed(0)
    replies = [r for prompt in prompts for r in run.sample(prompt, count, LENGTH, generator)]
    return sum(reward_of(reply) for reply in replies) / len(replies)


LENGTH, GROUP, ITERATIONS, PASSES = 5, 16, 16, 3
PROMPTS = [[ASK, *word.encode(), SAY] for word in ("alpha", "beta", "gamma")]


def reward_of(reply: Sequence[int]) -> float:
    """Share of the reply's tokens in the first quarter of the byte alphabet."""
    return sum(token < 64 for token in reply) / len(reply)


# -- the tests ---------------------------------------------------------------------------------------------------------


async def test_sft_has_the_losses_and_reaches_the_level_of_a_plain_run(backend: LocalBackend, byte_model: Path) -> None:
    rows = capital_ids()
    plain = PlainRun(byte_model, await backend.save_for_sampler("start"))
    before = [plain.sample(prompt, 1, len(reply), None)[0] == reply for prompt, reply in rows]
    steps = await train_sft(
        backend, [reply_datum(p, r) for p, r in rows], epochs=50, batch_size=3, learning_rate=RATE, seed=SEED
    )
    losses = plain_sft(plain, rows, 50, 3, RATE, SEED)
    assert len(losses) == len(steps) == 100
    gaps = [abs(step.loss - loss) for step, loss in zip(steps, losses, strict=True)]
    assert max(gaps) < TOLERANCE, f"largest gap {max(gaps):.2e} at step {gaps.index(max(gaps)) + 1}"
    assert losses[0] > 4
    assert losses[-1] < 0.1
    product = PlainRun(byte_model, await backend.save_for_sampler("end"))
    for run in (plain, product):
        assert [run.sample(prompt, 1, len(reply), None)[0] for prompt, reply in rows] == [reply for _, reply in rows]
    assert not any(before)
    client = await backend.snapshot_sampling_client()
    for prompt, reply in rows:
        sampled = await client.sample_async(
            types.ModelInput.from_ints(prompt), 1, types.SamplingParams(max_tokens=16, temperature=0.0)
        )
        assert sampled.sequences[0].tokens == reply
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.4f}, largest gap {max(gaps):.1e}")


def as_plain(group: TrajectoryGroup) -> Group:
    """A recorded group as plain lists."""
    calls = [call for (call,) in group.calls_G]
    return Group(calls[0].prompt_ids, [c.output_ids for c in calls], [c.logprobs for c in calls], group.rewards_G)


async def test_rl_has_the_losses_and_reaches_the_level_of_a_plain_run(backend: LocalBackend, byte_model: Path) -> None:
    start = await backend.save_for_sampler("start")
    tokenizer = backend.get_tokenizer()
    early = {tokenizer.decode([token]) for token in range(64)}
    recorded: list[list[Group]] = []

    def keep(record: RlIteration, groups: list[TrajectoryGroup]) -> None:
        recorded.append([as_plain(group) for group in groups])

    history = await train_rl(
        backend,
        PROMPTS,
        render=lambda prompt: prompt,
        reward=lambda prompt, text: sum(letter in early for letter in text) / LENGTH,
        settings=TrainingSettings(
            "ppo", types.AdamParams(learning_rate=RATE, eps=1e-8), normalization="sum", passes=PASSES
        ),
        epochs=ITERATIONS,
        batch_size=len(PROMPTS),
        group_size=GROUP,
        sampling=types.SamplingParams(max_tokens=LENGTH, stop=[]),
        seed=SEED,
        on_iteration=keep,
    )
    end = await backend.save_for_sampler("end")
    replay, gaps, sizes = PlainRun(byte_model, start), [], []
    for record, groups in zip(history, recorded, strict=True):
        steps = record.steps or [None] * PASSES  # all rewards equal: nothing to learn, and the plain loss is 0
        for metrics in steps:
            loss = plain_ppo_loss(replay, groups)
            if metrics is None:
                assert loss.item() == 0
                continue
            norm = replay.step(loss, RATE)
            gaps.append(abs(metrics["loss:sum"] - loss.item()))
            sizes.append(abs(loss.item()))
            assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert len(gaps) >= 0.7 * ITERATIONS * PASSES
    assert max(gaps) < TOLERANCE, f"largest gap {max(gaps):.2e} at step {gaps.index(max(gaps)) + 1}"
    assert max(sizes) > 1  # passes after the first have ratios other than 1, so these losses are no zeros

    product, own = PlainRun(byte_model, end), PlainRun(byte_model, start)
    before = plain_level(own, PROMPTS)
    plain_rl(own, PROMPTS)
    levels = {name: plain_level(run, PROMPTS) for name, run in (("product", product), ("replay", replay), ("own", own))}
    assert before < 0.35
    assert history[-1].reward_mean > 0.9
    assert levels["product"] > 0.9
    assert levels["product"] == pytest.approx(levels["replay"], abs=0.01)
    assert levels["product"] == pytest.approx(levels["own"], abs=0.1)
    print(f"{before=:.3f} {levels} largest loss gap {max(gaps):.1e} of up to {max(sizes):.2f}")
