"""The KV memory keeps what it holds while it grows, and attention masks hide what they should."""

import torch

from nat_plugin_evsys.engine.sampling.kv_cache import AttentionMasks, KVLayout, SlotStore, rounded_length
from nat_plugin_evsys.engine.sampling.prefix_cache import BLOCK, PrefixCache

LAYOUT = KVLayout(((2, 4, 4), (1, 6, 4)), torch.float32, torch.device("cpu"))


def fill(store, slot, length, seed):
    piece = torch.randn(2, 2, 2, length, 6, generator=torch.Generator().manual_seed(seed))
    store.write(slot, [piece[:, :, :, :3], piece[:, :, :, 3:]])
    return piece


def test_growing_keeps_the_slots_in_use():
    store = SlotStore(LAYOUT)
    store.reserve(3, 10)
    pieces = [fill(store, slot, 10, slot) for slot in range(3)]
    for slots, length in [(9, 10), (9, 65), (3, 1025), (4, 3000)]:
        store.reserve(slots, length)
        assert store.slots >= slots
        assert store.length == max(rounded_length(length), rounded_length(10))
        for slot, piece in enumerate(pieces):
            assert torch.equal(store.read(slot, 0, 10), piece)
        keys, values = store.views(1)
        assert keys.shape == (store.slots, 1, store.length, 6)
        assert values.shape == (store.slots, 1, store.length, 4)
    assert store.nbytes == store.slots * store.length * LAYOUT.bytes_per_token
    assert store.slots == 4  # long slots are not reserved in advance


def test_copy_and_wipe_touch_one_slot():
    store = SlotStore(LAYOUT)
    store.reserve(3, 10)
    a, b = fill(store, 0, 10, 0), fill(store, 1, 10, 1)
    store.copy(0, 2, 7)
    assert torch.equal(store.read(2, 0, 7), a[:, :, :, :7])
    assert store.read(2, 7, 10).abs().max() == 0
    store.wipe(0)
    assert store.read(0, 0, 10).abs().max() == 0
    assert torch.equal(store.read(1, 0, 10), b)


def test_rounded_length_is_enough_and_never_double_for_long_ones():
    for length in (1, 63, 64, 65, 1000, 1024, 1025, 5000, 40960):
        assert length <= rounded_length(length) <= max(64, 2 * length, length + 1023)
    assert rounded_length(33_000) < 34_000


def test_masks_per_layer_type():
    class Config:
        layer_types = ("full_attention", "sliding_attention")
        sliding_window = 3

    masks = AttentionMasks(Config(), torch.float32).build(torch.tensor([[4, 5], [0, 1]]), 6)
    assert set(masks) == {"full_attention", "sliding_attention"}
    seen = {kind: (mask == 0).int().squeeze(1).tolist() for kind, mask in masks.items()}
    assert seen["full_attention"] == [[[1, 1, 1, 1, 1, 0], [1] * 6], [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]]
    assert seen["sliding_attention"] == [
        [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]],
        [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]


def test_prefixes_are_found_by_tokens_and_policy_and_evicted_oldest_first():
    store = SlotStore(LAYOUT)
    store.reserve(2, 64)
    piece = fill(store, 0, 64, 3)
    block_bytes = piece[:, :, :, :BLOCK].nbytes
    cache = PrefixCache(4 * block_bytes)
    tokens = list(range(50))
    cache.add(1, tokens, store, 0)
    assert cache.used_bytes == 3 * block_bytes
    cache.add(1, tokens, store, 0)
    assert cache.used_bytes == 3 * block_bytes  # stored once
    assert cache.load(1, tokens, store, 1) == 48
    assert torch.equal(store.read(1, 0, 48), piece[:, :, :, :48])
    assert cache.load(1, tokens[:48], store, 1) == 32  # the last token is left to be fed
    assert cache.load(1, [*tokens[:20], 99, *tokens[21:]], store, 1) == 16
    assert cache.load(1, tokens[:16], store, 1) == 0
    assert cache.load(2, tokens, store, 1) == 0
    cache.add(2, [7] * 40, store, 0)  # two blocks: one of the first policy's has to go, and it is the deepest
    assert cache.used_bytes == 4 * block_bytes
    assert cache.load(1, tokens, store, 1) == 32
    assert cache.load(2, [7] * 40, store, 1) == 32
