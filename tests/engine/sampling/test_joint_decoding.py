"""Adapters that are sampled at once share the passes, and each samples what it samples alone."""

from __future__ import annotations

import gc
import math
import random
import time
from typing import Any

import pytest
import torch
from hold import Hold
from tinker import types
from tiny import perturb

from nat_plugin_evsys.engine.model.lora import LoraAdapter, LoraLinear
from nat_plugin_evsys.engine.sampler import Sampler
from nat_plugin_evsys.engine.spans import attention, joint
from nat_plugin_evsys.engine.spans.mixed import MixedAdapters
from nat_plugin_evsys.engine.spans.rollout_model import RolloutModel
from nat_plugin_evsys.engine.spans.slots import RowSlots
from nat_plugin_evsys.errors import ModelError

FAMILIES = ("qwen3", "llama")
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[])


def adapters_of(base: Any) -> list[LoraAdapter | None]:
    """Of unequal ranks, scales and layers, and the bare model."""
    kinds: list[dict[str, Any]] = [
        {"rank": 2, "alpha": 4.0},
        {"rank": 5, "alpha": 3.0, "train_mlp": False},
        {"rank": 3, "alpha": 9.0, "train_unembed": False},
        {"rank": 2, "alpha": 4.0, "train_attn": False},
    ]
    made = [perturb(LoraAdapter.create(base.model, **kind), seed) for seed, kind in enumerate(kinds)]
    return [*made, None]


def prompts(seed: int, count: int) -> list[types.ModelInput]:
    draw = random.Random(seed)
    start = [draw.randint(0, 30) for _ in range(9)]
    rows = [
        start[: draw.randint(1, 9)] + [draw.randint(0, 30) for _ in range(draw.randint(1, 20))] for _ in range(count)
    ]
    return [types.ModelInput.from_ints(row) for row in rows]


def wait_until_idle(sampler: Sampler) -> None:
    until = time.monotonic() + 60
    while sampler._batches:
        assert time.monotonic() < until
        time.sleep(0.01)


def check(futures: list[Any], alone: list[Any]) -> None:
    for one, other in zip(futures, alone, strict=True):
        for here, there in zip(one.result(120).sequences, other.sequences, strict=True):
            assert list(here.tokens) == list(there.tokens)
            torch.testing.assert_close(torch.tensor(here.logprobs), torch.tensor(there.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_samples_what_it_samples_alone(base_of: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(family)
    adapters = adapters_of(base)
    wide: list[int] = []
    stepped = joint.JointDecoding.step

    def counted(self: Any, decoders: Any, tokens: Any) -> Any:
        wide.append(len(decoders))
        return stepped(self, decoders, tokens)

    monkeypatch.setattr(joint.JointDecoding, "step", counted)
    asked = [(which, prompt) for which in range(len(adapters)) for prompt in prompts(which, 3)]
    plain = Sampler(base, path="plain")
    clients = [plain.client(adapter, at) for at, adapter in enumerate(adapters)]
    alone = [clients[which].sample(prompt, 2, GREEDY).result(120) for which, prompt in asked]
    plain.close()
    assert not wide
    sampler = Sampler(base)
    assert not sampler.plain_because
    clients = [sampler.client(adapter, at) for at, adapter in enumerate(adapters)]
    random.Random(1).shuffle(order := list(range(len(asked))))
    futures = {at: clients[asked[at][0]].sample(asked[at][1], 2, GREEDY) for at in order}
    check([futures[at] for at in range(len(asked))], alone)
    assert max(wide) == len(adapters)
    # Once all are done, one alone is decoded with weights of its own again.
    wide.clear()
    check([clients[0].sample(asked[0][1], 2, GREEDY)], alone[:1])
    assert not wide
    sampler.close()


@pytest.mark.parametrize("value", [float("nan"), 3e38], ids=["nan", "overflows"])
def test_a_broken_adapter_reaches_no_other(value: float, base_of: Any) -> None:
    base = base_of("qwen3")
    good = perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), 1)
    broken = perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), 2)
    for name, (_, b) in broken.weights.items():
        if name.endswith("v_proj"):
            b.data[0] = value
    sampler = Sampler(base)
    [prompt] = prompts(3, 1)
    alone = sampler.client(good, 0).sample(prompt, 1, GREEDY).result(120)
    clients = [sampler.client(adapter, at) for at, adapter in enumerate((good, broken, None))]
    futures = [client.sample(prompt, 1, GREEDY) for client in clients]
    with pytest.raises(ModelError, match="not finite"):
        futures[1].result(120)
    check(futures[:1], [alone])
    assert len(futures[2].result(120).sequences[0].tokens) == 6
    sampler.close()


def test_where_a_joint_pass_fails_each_goes_alone(
    base_of: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of("qwen3")
    adapters = adapters_of(base)[:3]
    sampler = Sampler(base)
    clients = [sampler.client(adapter, at) for at, adapter in enumerate(adapters)]
    asked = prompts(4, 3)
    alone = [client.sample(prompt, 2, GREEDY).result(120) for client, prompt in zip(clients, asked, strict=True)]
    monkeypatch.setattr(joint.MixedAdapters, "set_rows", lambda self, counts: setattr(self, "_groups", torch.zeros(1)))
    check([client.sample(prompt, 2, GREEDY) for client, prompt in zip(clients, asked, strict=True)], alone)
    assert "sampled one after the other: their joint pass fails" in caplog.text
    sampler.close()


def test_where_a_joint_pass_is_wrong_each_goes_alone(
    base_of: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of("qwen3")
    adapters = adapters_of(base)[:3]
    plain = Sampler(base, path="plain")
    asked = prompts(4, 3)
    clients = [plain.client(adapter, at) for at, adapter in enumerate(adapters)]
    alone = [client.sample(prompt, 2, GREEDY).result(120) for client, prompt in zip(clients, asked, strict=True)]
    plain.close()
    held = MixedAdapters.hold
    # The slots in another order than the one that is said.
    monkeypatch.setattr(MixedAdapters, "hold", lambda self, given: held(self, dict(reversed(given.items())))[::-1])
    sampler = Sampler(base)
    assert "sampled one after the other, not in one pass: its logits are off by" in caplog.text
    assert not sampler.plain_because
    clients = [sampler.client(adapter, at) for at, adapter in enumerate(adapters)]
    check([client.sample(prompt, 2, GREEDY) for client, prompt in zip(clients, asked, strict=True)], alone)
    sampler.close()


@pytest.mark.parametrize("at", [0, -1])
def test_where_a_joint_pass_gives_no_number_nothing_is_sampled_by_it(
    at: int, base_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the policies, or of the bare model beside them, in the check at load."""
    given = RolloutModel.mixed_logits

    def spoilt(*args: Any) -> list[torch.Tensor]:
        found = given(*args)
        found[at] = found[at] * math.nan
        return found

    monkeypatch.setattr(RolloutModel, "mixed_logits", spoilt)
    sampler = Sampler(base_of("qwen3"))
    assert "its logits on spans are off by inf" in sampler.plain_because
    sampler.close()


def test_rows_that_find_no_memory_fail_alone_and_the_others_go_on_from_their_tokens(
    base_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of("qwen3")
    sampler = Sampler(base)
    clients = [sampler.client(adapter, at) for at, adapter in enumerate(adapters_of(base)[:3])]
    asked = prompts(9, 3)
    longer = types.SamplingParams(max_tokens=30, temperature=0.0, stop=[])
    alone = [client.sample(prompt, 1, longer).result(120) for client, prompt in zip(clients, asked, strict=True)]
    wait_until_idle(sampler)
    enter, left = RowSlots.enter, [MemoryError("no memory for 64 MiB")]

    def failing(self: Any, starts: Any) -> Any:
        if len(starts) == 2 and left:
            raise left.pop()
        return enter(self, starts)

    monkeypatch.setattr(RowSlots, "enter", failing)
    hold = Hold()
    with sampler._wake:
        futures = [clients[0].sample(asked[0], 1, longer, on_tokens=hold), clients[1].sample(asked[1], 1, longer)]
    hold.wait()
    broken = clients[2].sample(asked[2], 2, longer)
    hold.release()
    with pytest.raises(ModelError, match="no memory for 64 MiB"):
        broken.result(120)
    check([*futures, clients[2].sample(asked[2], 1, longer)], alone)
    sampler.close()


def test_six_adapters_take_the_passes_and_the_weights_of_one(base_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("qwen3")
    sampler = Sampler(base)
    assert sampler._fast is not None
    passes: list[int] = []
    for name in ("logits", "mixed_logits"):
        run = getattr(sampler._fast, name)
        monkeypatch.setattr(sampler._fast, name, lambda *given, run=run: passes.append(1) or run(*given))
    packed: list[int] = []
    pack = sampler._fast.versions._pack_layer
    monkeypatch.setattr(
        sampler._fast.versions, "_pack_layer", lambda layer, *given: packed.append(1) or pack(layer, *given)
    )
    adapters = [perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), seed) for seed in range(6)]
    params = types.SamplingParams(max_tokens=20, temperature=0.0, stop=[])

    def cost(clients: list[Any]) -> tuple[int, int]:
        passes.clear()
        packed.clear()
        with sampler._wake:  # all of them are in the inbox before the first is taken
            futures = [client.sample(prompt, 1, params) for client, prompt in zip(clients, prompts(5, 6), strict=True)]
        assert all(len(future.result(120).sequences[0].tokens) == 20 for future in futures)
        return len(passes), len(packed)

    one = cost([sampler.client(adapters[0], 0)] * 6)
    six = cost([sampler.client(adapter, at) for at, adapter in enumerate(adapters)])
    assert six == one
    sampler.close()


def test_six_adapters_attend_in_the_calls_of_one(base_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("qwen3")
    sampler = Sampler(base)
    calls: list[int] = []
    own = attention._own
    monkeypatch.setattr(attention, "_own", lambda *given: calls.append(1) or own(*given))
    draw = random.Random(8)
    asked = [types.ModelInput.from_ints([first, *(draw.randint(0, 30) for _ in range(11))]) for first in range(6)]

    def count(clients: list[Any]) -> int:
        calls.clear()
        with sampler._wake:
            futures = [client.sample(prompt, 1, GREEDY) for client, prompt in zip(clients, asked, strict=True)]
        assert all(len(future.result(120).sequences[0].tokens) == 6 for future in futures)
        return len(calls)

    adapters = [perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), seed) for seed in range(6)]
    one = count([sampler.client(adapters[0], 0)] * 6)
    assert count([sampler.client(adapter, at) for at, adapter in enumerate(adapters)]) == one
    assert one == 5 * base.model.config.num_hidden_layers
    sampler.close()


@torch.inference_mode()
def test_adapters_that_come_and_go_keep_their_own_deltas(base_of: Any) -> None:
    base = base_of("qwen3")
    made = [adapter for adapter in adapters_of(base) if adapter is not None]
    layers = {
        name: module.weight.shape
        for name, module in base.model.named_modules()
        if any(name in adapter.weights for adapter in made)
    }
    draw, mixed = random.Random(0), MixedAdapters()
    held: list[set[int]] = [{0, 1, 2}, {0, 2}, {2}, {1, 2}, {0, 1, 2, 3}, {3, 0}, {3, 1, 0}, {2, 1}]
    for wanted in held:
        order = mixed.hold({ident: made[ident] for ident in wanted})
        assert set(order) == wanted
        uneven = [*(draw.randint(0, 3) for _ in order), 2]
        for counts in (uneven, [2] * len(order), [*[1] * len(order), 3]):
            mixed.set_rows(counts)
            for name, (outputs, inputs) in layers.items():
                x, out = torch.randn(1, sum(counts), inputs), torch.randn(1, sum(counts), outputs)
                expected = out.clone()
                for ident, rows, sums in zip(order, x[0].split(counts), expected[0].split(counts), strict=False):
                    delta = made[ident].delta(name, rows)
                    if delta is not None:
                        sums += delta
                torch.testing.assert_close(mixed.add(name, x, out.clone()), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The slots that adapters are written to."""
    slots: list[int] = []
    write = MixedAdapters._write
    monkeypatch.setattr(MixedAdapters, "_write", lambda self, slot, each: slots.append(slot) or write(self, slot, each))
    return slots


def test_one_that_leaves_costs_no_new_copies_of_the_others(base_of: Any, written: list[int]) -> None:
    base = base_of("qwen3")
    made = [perturb(LoraAdapter.create(base.model, rank=2, alpha=4.0), seed) for seed in range(4)]
    mixed = MixedAdapters()
    mixed.hold(dict(enumerate(made[:3])))
    mixed.hold({0: made[0], 2: made[2]})
    assert written == [0, 1, 2]
    assert mixed.hold({0: made[0], 2: made[2], 3: made[3]}) == [0, 2, 3]
    assert written == [0, 1, 2, 2]


def test_what_was_joined_stays_for_the_next_round_until_its_versions_go(base_of: Any, written: list[int]) -> None:
    base = base_of("qwen3")
    sampler = Sampler(base)
    assert sampler._joint is not None
    mixed = sampler._joint._mixed
    clients = [sampler.client(adapter, at) for at, adapter in enumerate(adapters_of(base)[:3])]
    asked = prompts(6, 3)
    written.clear()  # what the check at the start wrote
    alone = [client.sample(prompt, 1, GREEDY).result(120) for client, prompt in zip(clients, asked, strict=True)]
    for _ in range(3):
        with sampler._wake:
            futures = [client.sample(prompt, 1, GREEDY) for client, prompt in zip(clients, asked, strict=True)]
        check(futures, alone)
        wait_until_idle(sampler)
        assert sorted(written) == [0, 1, 2]
    assert mixed.nbytes > 0
    sampler.rest(clients[0])
    assert len(mixed._slots) == 2
    del clients[1:]
    gc.collect()
    sampler.rest(clients[0])  # so that it looks
    assert not mixed._slots
    assert mixed.nbytes == 0
    check([clients[0].sample(asked[0], 1, GREEDY)], alone[:1])
    sampler.close()


def test_joined_adapters_larger_than_the_model_are_not_kept(base_of: Any) -> None:
    base = base_of("qwen3")
    adapters = [perturb(LoraAdapter.create(base.model, rank=32, alpha=4.0), seed) for seed in range(3)]
    sampler = Sampler(base)
    assert sampler._joint is not None
    sizes: list[int] = []
    mixed = sampler._joint._mixed
    clients = [sampler.client(adapter, at) for at, adapter in enumerate(adapters)]
    with sampler._wake:
        futures = [client.sample(prompt, 1, GREEDY) for client, prompt in zip(clients, prompts(7, 3), strict=True)]
    futures[0].add_done_callback(lambda _: sizes.append(mixed.nbytes))
    assert all(len(future.result(120).sequences[0].tokens) == 6 for future in futures)
    wait_until_idle(sampler)
    sampler.close()
    assert sizes[0] > sum(module.weight.nbytes for module in base.model.modules() if isinstance(module, LoraLinear))
    assert mixed.nbytes == 0
