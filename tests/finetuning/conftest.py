"""A real policy for the adapter: LocalBackend over a tiny Qwen3, sampled and trained for real."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nat.data_models.finetuning import Trajectory, TrajectoryCollection
from tinker import ModelInput, types
from tiny import tiny_model

from nat_plugin_evsys.backends.local import LocalBackend
from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.config import EvsysTrainerAdapterConfig
from nat_plugin_evsys.engine.model.loading import wrap_model
from nat_plugin_evsys.engine.model.lora import LoraAdapter
from nat_plugin_evsys.finetuning.trainer_adapter import EvsysTrainerAdapter
from nat_plugin_evsys.rollouts.trajectories import build_trajectory

VOCAB = 32
WANTED = 7
"""The token that is rewarded."""


class PausingBackend(LocalBackend):
    """LocalBackend whose forward_backward waits at a gate, so that a test can look at a job in flight."""

    gate: asyncio.Event
    calls: list[tuple[str, Any]]

    def forward_backward_async(self, data: Any, *, loss_fn: Any, loss_fn_config: Any = None) -> Any:
        self.calls.append(("forward_backward", (len(data), loss_fn, loss_fn_config)))
        submit = super().forward_backward_async

        async def gated() -> Any:
            await self.gate.wait()
            return await submit(data, loss_fn=loss_fn, loss_fn_config=loss_fn_config)

        return gated()

    def forward_backward_custom_async(self, data: Any, loss_fn: Any) -> Any:
        self.calls.append(("forward_backward_custom", len(data)))
        submit = super().forward_backward_custom_async
        if self.gate.is_set():  # train_dpo relies on its being submitted at once
            return submit(data, loss_fn)

        async def gated() -> Any:
            await self.gate.wait()
            return await submit(data, loss_fn)

        return gated()

    def optim_step_async(self, adam: types.AdamParams) -> Any:
        self.calls.append(("optim_step", adam))
        return super().optim_step_async(adam)


class LetterRenderer:
    """A token per letter; 29 opens a user's message, 30 ends any, 31 opens the assistant's."""

    def render(self, messages: Any, tools: Any) -> list[int]:
        return [*(token for message in messages for token in (29, *self._ids(message), 30)), 31]

    def render_reply(self, message: Any) -> list[int]:
        return [*self._ids(message), 30]

    def _ids(self, message: Any) -> list[int]:
        return [ord(letter) - ord("a") for letter in message["content"]]


class TinyPolicy:
    """What ``PolicyUnderTraining`` asks for, over the backend; also samples."""

    def __init__(self, backend: PausingBackend) -> None:
        self.backend = backend
        self.renderer = LetterRenderer()
        self.client: Any = None
        self.health: Callable[[], Awaitable[bool]] = backend.is_healthy

    async def ensure_loaded(self) -> None:
        if self.client is None:
            await self.publish()

    async def publish(self, name: str | None = None) -> int:
        self.client = await self.backend.snapshot_sampling_client(name)
        return self.client.policy_version

    async def is_healthy(self) -> bool:
        return await self.health()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.backend._model.adapter.named_tensors()}

    async def call(self, prompt_ids: list[int], seed: int, max_tokens: int = 6) -> Call:
        await self.ensure_loaded()
        params = types.SamplingParams(max_tokens=max_tokens, seed=seed, temperature=1.0, stop=[])
        sampled = (await self.client.sample_async(ModelInput.from_ints(prompt_ids), 1, params)).sequences[0]
        return Call(
            call_id=f"chatcmpl-{'-'.join(map(str, prompt_ids))}-{seed}",
            index=0,
            run_id=None,
            step_id=None,
            policy_version=self.client.policy_version,
            prompt_ids=prompt_ids,
            output_ids=list(sampled.tokens),
            logprobs=list(sampled.logprobs),
            stop_reason=sampled.stop_reason,
            temperature=1.0,
            top_p=1.0,
            messages=[{"role": "user", "content": str(prompt_ids)}],
            tools=[],
            reply={"role": "assistant", "content": str(list(sampled.tokens))},
            sequence=seed,
        )

    async def trajectory(self, prompt_ids: list[int], seed: int, turns: int = 1) -> Trajectory:
        """Each further turn reads all tokens before it plus one more. Reward: share of wanted tokens."""
        calls = []
        for turn in range(turns):
            calls.append(await self.call(prompt_ids, 1000 * turn + seed))
            prompt_ids = [*prompt_ids, *calls[-1].output_ids, turn + 1]
        output = [token for call in calls for token in call.output_ids]
        return build_trajectory(calls, output.count(WANTED) / len(output), {"row_id": str(prompt_ids[:2])})

    async def collection(
        self, groups: int = 2, size: int = 4, *, turns: int = 1, seed: int = 0, run_id: str = "run"
    ) -> TrajectoryCollection:
        """Rolls out until every group has rewards that differ."""
        rows: list[list[Trajectory]] = []
        source = random.Random(seed)
        while len(rows) < groups:
            prompt = [source.randrange(VOCAB), source.randrange(VOCAB)]
            row = [await self.trajectory(prompt, source.randrange(10**6), turns) for _ in range(size)]
            if len({trajectory.reward for trajectory in row}) > 1:
                rows.append(row)
        return TrajectoryCollection(trajectories=rows, run_id=run_id)


@pytest.fixture
async def make_policy(tmp_path: Path) -> AsyncIterator[Callable[..., TinyPolicy]]:
    """``make_policy()``: each one the same random model with the same fresh adapter."""
    made: list[TinyPolicy] = []

    def make() -> TinyPolicy:
        model = tiny_model("qwen3", vocab_size=VOCAB, max_position_embeddings=64, initializer_range=0.1)
        base = wrap_model("tiny", model, tokenizer=None)
        adapter = LoraAdapter.create(base.model, rank=4, alpha=8, seed=0)
        backend = PausingBackend(base, adapter, checkpoint_dir=tmp_path / "checkpoints")
        backend.gate, backend.calls = asyncio.Event(), []
        backend.gate.set()
        made.append(TinyPolicy(backend))
        return made[-1]

    yield make
    for policy in made:
        await policy.backend.close()


@pytest.fixture
def policy(make_policy: Callable[..., TinyPolicy]) -> TinyPolicy:
    return make_policy()


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., EvsysTrainerAdapter]:
    """``make_adapter(policy, **config)``: an adapter that writes to tmp_path/run."""

    def make(policy: TinyPolicy, **config: Any) -> EvsysTrainerAdapter:
        adapter = EvsysTrainerAdapter(EvsysTrainerAdapterConfig(policy="policy", **config), policy)
        adapter.run_dir = tmp_path / "run"
        return adapter

    return make
