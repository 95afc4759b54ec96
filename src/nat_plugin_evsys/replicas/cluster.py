"""The Ray cluster of this process: joined, or started on this machine, and left with its last user."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from nat_plugin_evsys.engine.machine.memory import free_bytes
from nat_plugin_evsys.errors import ConfigError

INSTALL = "pip install 'nat_plugin_evsys[ray]'"

_MOST_OBJECT_BYTES = 2 * 2**30
_CONNECT_S = 10.0
_FREED_S = 10.0
_lock = threading.Lock()
_users = 0
_keeper: _Keeper | None = None


@dataclass(frozen=True)
class Replicas:
    """How many replicas of a base model, of what size, and where.

    Attributes:
        cpus: cores of each, and threads that it computes on.
        gpus: of each; None is one if the cluster has any. With several the model is split over as many processes.
        address: of a running cluster; None starts one on this machine.
    """

    count: int
    cpus: int = 1
    gpus: int | None = None
    address: str | None = None


class _Keeper:
    """Starts Ray in a thread that lives until Ray is to end: Linux kills Ray's processes with the *thread* that started
    them, and a thread of an event loop ends with the loop."""

    def __init__(self, address: str | None) -> None:
        self._started, self._ending = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(address,), name="evsys-ray", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def _run(self, address: str | None) -> None:
        import ray

        try:
            _start(address)
        except Exception as exc:  # noqa: BLE001 - boundary: whatever Ray raises is said to whoever asked for it
            where = "a cluster on this machine" if address is None else f"the cluster at {address}"
            self._error = ConfigError(f"ray: {where} cannot be used: {type(exc).__name__}: {exc}")
        self._started.set()
        if self._error is None:
            self._ending.wait()
            ray.shutdown()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()


def join(address: str | None) -> None:
    """Make sure that this process is part of a cluster; ``leave`` when done.

    A cluster that this process is part of already is used as it is, and not left.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    global _users, _keeper
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # a mere folder of that name, such as Ray's own /tmp/ray, is no package
        raise ConfigError(f"ray: Ray is not installed; type: {INSTALL}")
    import ray

    with _lock:
        if not ray.is_initialized():
            _keeper = _Keeper(address)
        _users += 1


def leave() -> None:
    """End the cluster if this process started it and nobody else here uses it."""
    global _users, _keeper
    with _lock:
        _users -= 1
        if _users == 0 and _keeper is not None:
            _keeper.end()
            _keeper = None


def keep_signal_handlers() -> None:
    """Install this process's handlers again over Ray's, which print a stack first. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
            signal.siginterrupt(number, False)  # as asyncio sets it


def gpus_each(wanted: int | None) -> int:
    """GPUs of a replica: as wanted, or one if the cluster has any."""
    import ray

    return wanted if wanted is not None else int(ray.cluster_resources().get("GPU", 0) > 0)


def check_room(what: str, replicas: int, cpus: int, gpus: int) -> None:
    """Raise ConfigError if so many replicas do not fit into what the cluster has free: Ray would wait forever.

    What ended a moment ago is not free yet, so it waits for some seconds.

    Args:
        what: was asked for, for the error's message.
    """
    import ray

    wanted = {"GPU": replicas * gpus, "CPU": replicas * cpus}
    deadline = time.monotonic() + _FREED_S
    free = ray.available_resources()
    while any(free.get(name, 0.0) < least for name, least in wanted.items()) and time.monotonic() < deadline:
        time.sleep(0.1)
        free = ray.available_resources()
    for name, each in (("GPU", gpus), ("CPU", cpus)):
        if replicas * each > free.get(name, 0.0):
            raise ConfigError(
                f"ray: {what} with {each} {name} each needs {replicas * each} {name}, and the cluster "
                f"has {free.get(name, 0.0):g} free; set fewer, or add machines (`ray start --address=HOST:PORT`)"
            )


def _start(address: str | None) -> None:
    import ray

    host, separator, port = (address or "").rpartition(":")
    if separator and port.isdigit() and "://" not in host:
        # Ray itself asks for a minute or more.
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    options: dict[str, Any] = {"address": address}
    if address is None:
        # Ray's own default takes a third of the machine. What passes through are weights and gradients of adapters.
        memory = min(_MOST_OBJECT_BYTES, free_bytes(torch.device("cpu")) // 8)
        options = {"address": "local", "object_store_memory": memory, "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home unasked
    ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, namespace="evsys")
