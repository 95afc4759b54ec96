"""Errors that say nothing, said: NAT shows an error's text alone, and some errors have none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from nat_plugin_evsys.address_space import address_space_left
from nat_plugin_evsys.errors import EvsysError, OutOfMemoryError

logger = logging.getLogger(__name__)

_ALLOCATORS = ("can't allocate memory", "out of memory", "can't start new thread", "Cannot allocate memory")
"""What PyTorch, Python's threads and the system say."""
_NOTHING_LEFT = 32 * 2**20
"""Bytes of address space. With less left, libraries fail in ways of their own: `could not create a primitive`."""


@contextmanager
def readable_failures() -> Iterator[None]:
    """Within it an error for want of memory, or one without a text, becomes one that says what to do.

    Raises:
        OutOfMemoryError: memory ran out.
        EvsysError: an error had no text; the log has its traceback.
    """
    try:
        yield
    except EvsysError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in _ALLOCATORS) or _is_used_up():
            raise OutOfMemoryError(
                f"memory ran out ({type(error).__name__}: {error or 'an allocation failed'}); lower max_batch_size, "
                "context_length, lora_rank or max_concurrency, or raise the limit of this process (ulimit -v, the "
                "container's memory)"
            ) from error
        if not str(error).strip():
            logger.exception("an error without a text")
            raise EvsysError(f"{type(error).__name__}, without a text; the log above has the traceback") from error
        raise


def _is_used_up() -> bool:
    left = address_space_left()
    return left is not None and left < _NOTHING_LEFT
