"""A vLLM server as a process of ours, on loopback and with a key of its own."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from nat_plugin_evsys.errors import ConfigError, ServiceUnavailableError
from nat_plugin_evsys.runtime.ports import free_port

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that ``--max-lora-rank`` takes."""

_LOADED, _IN_A_BATCH = 8, 2
"""Adapters that vLLM keeps, and that it can mix in a batch: calls in flight finish on their policy version."""

_POLL_SECONDS, _END_SECONDS = 0.5, 20.0
_STEP_SECONDS = "3600"
"""A step of the model may take so long before vLLM takes its worker for dead, unless the environment says otherwise;
its own 300 s end the server on a busy CPU."""

_AN_ERROR = re.compile(r"\b\w*(Error|Exception): |error: ")
_ERROR_LINES, _LAST_LINES = 2, 12

_ENDS_WITH_ITS_STARTER = 'exec 3<&0 </dev/null; (cat <&3 >/dev/null; kill -TERM 0) & exec 3<&-; exec "$@"'
"""A shell script that becomes its arguments, and ends its process group once its standard input is closed: also if
whoever holds the other end is killed."""

_OTHER_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""What would lead vLLM's interpreter to this environment's packages."""


def find_program(command: str) -> str:
    """The path of vLLM's program.

    Raises:
        ConfigError: there is none; the message says how to get one.
    """
    beside = Path(sys.executable).parent / command
    found = shutil.which(command) or (str(beside) if beside.is_file() else None)
    if found is None:
        raise ConfigError(
            f"rollout_engine: vllm needs vLLM, and there is no program {command!r} on this machine. Install it into "
            "an environment of its own (python -m venv /opt/vllm && /opt/vllm/bin/pip install vllm) and set "
            "vllm: {command: /opt/vllm/bin/vllm}, or name a running server: vllm: {base_url: …}"
        )
    return found


def serving_arguments(
    model: str, *, rank: int, dtype: str, context_length: int, sequences: int, on_cpu: bool
) -> list[str]:
    """The arguments of ``vllm serve`` that rollouts need.

    Logprobs are those of what is sampled (after temperature), no default of the model's ``generation_config`` changes
    what is sampled, and every prompt that the policy takes fits. On a CPU prompts are read whole: after a part of one
    that has a seed vLLM sets its generator back, which a CPU's generator refuses, and the engine ends.
    """
    max_rank = next((each for each in _LORA_RANKS if each >= rank), rank)
    return [
        *("serve", model),
        *("--dtype", dtype),
        *("--max-model-len", str(context_length)),
        *("--max-num-seqs", str(sequences)),
        *("--logprobs-mode", "processed_logprobs"),
        *("--generation-config", "vllm"),
        "--enable-prefix-caching",
        "--enable-lora",
        *("--max-lora-rank", str(max_rank)),
        *("--max-loras", str(_IN_A_BATCH)),
        *("--max-cpu-loras", str(_LOADED)),
        *["--no-enable-chunked-prefill"] * on_cpu,
    ]


class VllmServer:
    """The process, which ends with this one.

    Attributes:
        url: of the server, without a slash at its end.
        key: what requests must carry.
    """

    def __init__(self, program: str, arguments: Sequence[str], log: Path) -> None:
        """Start it; ``wait`` for it next. ``log`` is where its output goes."""
        self.key = secrets.token_hex(16)
        self._log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        shell = ["/bin/sh", "-c", _ENDS_WITH_ITS_STARTER, "vllm"]
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - the program and arguments are the user's own
                [*shell, program, *arguments, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(os.environ, self.key),
                start_new_session=True,
            )

    @property
    def runs(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def said(self) -> str:
        """What its output tells of an end: see ``telling_lines``."""
        return "\n".join(telling_lines(self._log.read_text(errors="replace")))

    def wait(self, seconds: float) -> None:
        """Return once the server answers.

        Raises:
            ServiceUnavailableError: it ended, or did not answer in time; with what it said.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if not self.runs:
                raise self._failure(f"ended with exit code {self._process.returncode} before it answered")
            if _answers(self.url, self.key):
                return
            time.sleep(_POLL_SECONDS)
        self.close()
        raise self._failure(f"did not answer within {seconds:g} s (vllm: {{start_timeout: …}})")

    def close(self) -> None:
        """End the process and those that it started. Idempotent."""
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        stdin.close()  # ends the group with SIGTERM
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        _kill_group(self._process.pid)  # a child may outlive it
        self._process.wait()

    def _failure(self, what: str) -> ServiceUnavailableError:
        return ServiceUnavailableError(f"vLLM {what}; it said:\n{self.said}")


def telling_lines(log: str) -> list[str]:
    """The first errors of vLLM's output, which later ones come from; without any, its last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if _AN_ERROR.search(line) and " WARNING " not in line]
    return errors[:_ERROR_LINES] or lines[-_LAST_LINES:]


def _environment(ours: Mapping[str, str], key: str) -> dict[str, str]:
    kept = {name: value for name, value in ours.items() if name not in _OTHER_ENVIRONMENT}
    ours_too = {"VLLM_API_KEY": key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
    return {"VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": _STEP_SECONDS, **kept, **ours_too}


def _answers(url: str, key: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
