"""One model's operations that have arrived but not run, by sequence number."""

from __future__ import annotations

import time

from nat_plugin_evsys.service.store.operations import Operation


class SequenceBuffer:
    """Holds operations until the earlier ones have arrived. Not thread-safe.

    Args:
        next_seq: the first sequence number that has not ended.
    """

    def __init__(self, next_seq: int) -> None:
        self.next_seq = next_seq
        self._waiting: dict[int, Operation] = {}
        self._moved_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, operation: Operation) -> bool:
        """Accept an operation; False if its number has been passed. Repeats are ignored."""
        if operation.seq_id < self.next_seq:
            return False
        self._waiting.setdefault(operation.seq_id, operation)
        self._moved_at = time.monotonic()
        return True

    def ready(self) -> Operation | None:
        """The next operation, if it has arrived."""
        return self._waiting.get(self.next_seq)

    def end(self, operation: Operation) -> None:
        """Move on to the next operation: this one has ended."""
        self._waiting.pop(operation.seq_id, None)
        self.next_seq = max(self.next_seq, operation.seq_id + 1)
        self._moved_at = time.monotonic()

    def stranded_since(self) -> float | None:
        """When (``time.monotonic``) something last moved, if operations wait for a missing one."""
        return self._moved_at if self._waiting and self.next_seq not in self._waiting else None

    def give_up(self) -> tuple[list[Operation], int]:
        """Stop waiting; returns the waiting operations, in order, and the number they waited for. Both are passed."""
        waiting, missing = [self._waiting[seq] for seq in sorted(self._waiting)], self.next_seq
        for operation in waiting:
            self.end(operation)
        return waiting, missing
