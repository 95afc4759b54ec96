"""Runs work that a cancellation must not stop halfway."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end even if the awaiting task is cancelled meanwhile; the cancellation follows afterwards.

    If the work fails, its error wins over the cancellation.
    """
    inner = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not inner.done():
        try:
            await asyncio.wait({inner})
        except asyncio.CancelledError as error:
            cancelled = error
    result = inner.result()
    if cancelled is not None:
        raise cancelled
    return result
