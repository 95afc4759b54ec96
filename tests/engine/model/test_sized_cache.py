"""What is kept within a bound of bytes, against a list that is searched."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from nat_plugin_evsys.engine.model.sized_cache import SizedCache, size_of

STEPS = st.lists(st.tuples(st.sampled_from(["put", "get", "pop"]), st.integers(0, 4), st.integers(1, 6)), max_size=30)


@given(most=st.integers(0, 12), steps=STEPS)
def test_it_keeps_what_was_used_last(most: int, steps: list[tuple[str, int, int]]) -> None:
    cache: SizedCache[int, int] = SizedCache(most)
    kept: list[tuple[int, int]] = []  # (key, bytes), the one used last at the end
    for number, (what, key, nbytes) in enumerate(steps):
        entry = next((each for each in kept if each[0] == key), None)
        if what == "put":
            cache.put(key, number, nbytes)
            if entry is None and most:
                kept.append((key, nbytes))
                while sum(size for _, size in kept) > most and len(kept) > 1:
                    kept.pop(0)
            continue
        found = cache.get(key) if what == "get" else cache.pop(key)
        assert (found is None) == (entry is None)
        if entry is not None:
            kept.remove(entry)
            kept += [entry] if what == "get" else []
        assert list(cache) == [each for each, _ in kept]
        assert cache.nbytes == sum(size for _, size in kept)
    cache.clear()
    assert (list(cache), cache.nbytes) == ([], 0)


def test_only_tensors_have_a_size() -> None:
    assert size_of([torch.zeros(3, 2), "x", None, torch.zeros(1, dtype=torch.int64)]) == 32
