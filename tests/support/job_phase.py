"""Waiting for a training job to get where a test wants it, however slow the machine is."""

import asyncio
import time
from typing import Any


async def until_computing(adapter: Any, ref: Any) -> None:
    """Until a job is in its first ``forward_backward``, where the test holds it."""
    deadline = time.monotonic() + 60
    while (status := await adapter.status(ref)).metadata["phase"] != "forward_backward":
        assert time.monotonic() < deadline, status
        await asyncio.sleep(0.01)
