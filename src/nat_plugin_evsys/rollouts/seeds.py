"""Seeds of rollouts."""

from __future__ import annotations

import hashlib


def rollout_seed(seed: int, run: str, message: str, attempt: int) -> int:
    """A 63-bit seed for one attempt at one dataset row.

    It depends neither on the order in which concurrent rollouts start nor on other rows, so a run can be repeated.
    """
    key = f"{seed}\x1f{run}\x1f{attempt}\x1f{message}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1
