"""A replica whose model is split over several processes of one machine: the actor leads, the others follow.

Every process runs every pass, over its part of the model; the leader alone answers. If one of them ends, all do: Ray
then starts the replica again, and runs again what it had not answered.
"""

from __future__ import annotations

import contextlib
import os
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nat_plugin_evsys.errors import ConfigError, DataError
from nat_plugin_evsys.replicas.passes import Order, Passes, ReplicaSettings, open_part
from nat_plugin_evsys.runtime.ports import free_port

_LOST = 70
"""Exit code of a process whose group is no longer whole."""


class Followers:
    """The other processes of a replica, started and made a group with this one; each loads its part meanwhile."""

    def __init__(self, settings: ReplicaSettings) -> None:
        context: Any = mp.get_context("spawn")
        address = f"tcp://127.0.0.1:{free_port()}"
        self._pipes: list[Any] = []
        for rank in range(1, settings.parts):
            ours, theirs = context.Pipe()
            process = context.Process(target=_follow, args=(settings, rank, address, theirs), daemon=True)
            process.start()
            theirs.close()
            threading.Thread(target=_end_with, args=(process,), daemon=True).start()
            self._pipes.append(ours)
        join_group(0, settings.parts, address)

    def send(self, order: Order) -> None:
        """Let them compute it, as this process must do next."""
        for pipe in self._pipes:
            pipe.send(order)


def join_group(rank: int, parts: int, address: str) -> None:
    """Become process ``rank`` of the group, on the device of that number if there are GPUs."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(parts))
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=address, rank=rank, world_size=parts)


def _follow(settings: ReplicaSettings, rank: int, address: str, pipe: Any) -> None:
    """A follower's life: until its leader's end of the pipe is closed."""
    join_group(rank, settings.parts, address)
    passes = Passes(open_part(settings))
    orders: list[Order] = []
    arrived = threading.Condition()

    def receive() -> None:
        # In a thread of its own: a leader that dies in the middle of a pass leaves this process waiting for it.
        while True:
            try:
                order = pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            with arrived:
                orders.append(order)
                arrived.notify()

    threading.Thread(target=receive, daemon=True).start()
    while True:
        with arrived:
            arrived.wait_for(lambda: orders)
            order = orders.pop(0)
        # What is wrong with an order, the leader says.
        with contextlib.suppress(DataError, ConfigError), whole_group():
            passes.run(order)


@contextlib.contextmanager
def whole_group() -> Iterator[None]:
    """End this process at an error that the others may not have, as they would wait for it in vain."""
    try:
        yield
    except (DataError, ConfigError):  # of the order itself, before anything is computed
        raise
    except BaseException:  # noqa: BLE001 - boundary: it goes to the log of a process that ends
        traceback.print_exc()
        os._exit(_LOST)


def _end_with(process: Any) -> None:
    process.join()
    os._exit(_LOST)
