"""What ``rollout_engine: vllm`` takes, and what it refuses by name."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nat_plugin_evsys.backends.vllm.server import VllmServer, find_program, serving_arguments, telling_lines
from nat_plugin_evsys.config.policy import EvsysPolicyConfig
from nat_plugin_evsys.config.vllm import VllmConfig
from nat_plugin_evsys.errors import ConfigError, ServiceUnavailableError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm": {"command": "vllm"}}, "set that, or remove it"),
        ({"rollout_engine": "vllm", "deterministic": True}, "use rollout_engine: embedded"),
        ({"rollout_engine": "vllm", "base_url": "http://h:1"}, r"rollout_engine \(the service samples\)"),
        ({"rollout_engine": "vllm", "vllm": {"base_url": "http://h:1", "args": ["--x"]}}, "args: remove it"),
        ({"rollout_engine": "vllm", "vllm": {"base_url": "h:1"}}, "must be a URL"),
        ({"rollout_engine": "vllm", "vllm": {"adapter_dir": "/tmp"}}, "adapter_dir without base_url"),
        ({"rollout_engine": "vllm", "vllm": {"max_kls": 1}}, "did you mean `max_kl`"),
        ({"rollout_engine": "vllm", "vllm": {"max_kl": 0}}, "greater than 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvsysPolicyConfig.model_validate({"base_model": "m", **settings})


def test_the_url_of_an_openai_client_is_that_of_the_server() -> None:
    assert VllmConfig(base_url="http://127.0.0.1:8000/v1/").base_url == "http://127.0.0.1:8000"


def test_a_program_that_is_not_there_is_named_with_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"no program 'no-such-vllm'.*pip install vllm.*base_url"):
        find_program("no-such-vllm")


@pytest.mark.parametrize(("rank", "most"), [(1, "1"), (4, "8"), (32, "32"), (33, "64"), (600, "600")])
def test_the_server_takes_the_rank(rank: int, most: str) -> None:
    arguments = serving_arguments("m", rank=rank, dtype="float32", context_length=64, sequences=4, on_cpu=False)
    assert arguments[arguments.index("--max-lora-rank") + 1] == most


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_prompt_is_read_whole_on_a_cpu(on_cpu: bool) -> None:
    """vLLM sets a seeded generator back after a part of a prompt, and a CPU's cannot be."""
    arguments = serving_arguments("m", rank=8, dtype="float32", context_length=64, sequences=4, on_cpu=on_cpu)
    assert ("--no-enable-chunked-prefill" in arguments) == on_cpu


def test_an_end_is_explained_by_the_first_errors() -> None:
    log = (
        "INFO hello\n(Server) WARNING ulimit: errors like `OSError: [Errno 24]`\n"
        "(Worker) ValueError: too little memory\n  raise X\nRuntimeError: see root cause above\nKeyError: 3"
    )
    assert telling_lines(log) == ["(Worker) ValueError: too little memory", "RuntimeError: see root cause above"]
    assert telling_lines("one\n\ntwo\n") == ["one", "two"]


def test_the_server_ends_with_its_start_failed_and_leaves_no_process(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\necho 'ValueError: no such model' >&2\nexit 3\n")
    program.chmod(0o755)
    server = VllmServer(str(program), ["serve", "m"], tmp_path / "log")
    with pytest.raises(ServiceUnavailableError, match=r"(?s)exit code 3.*no such model"):
        server.wait(30)
    assert server.said == "ValueError: no such model"
    server.close()
    assert not server.runs


def test_a_server_that_does_not_answer_is_ended_with_its_children(tmp_path: Path) -> None:
    program, pids = tmp_path / "vllm", tmp_path / "pids"
    program.write_text(f'#!/bin/sh\nsleep 600 &\necho "$$ $!" >{pids}\nwait\n')
    program.chmod(0o755)
    server = VllmServer(str(program), [], tmp_path / "log")
    with pytest.raises(ServiceUnavailableError, match="did not answer within 2 s"):
        server.wait(2)
    eventually(lambda: not [pid for pid in pids.read_text().split() if runs(int(pid))])


def test_a_child_that_ignores_its_end_is_ended(tmp_path: Path) -> None:
    program, pid = tmp_path / "vllm", tmp_path / "pid"
    program.write_text(
        f"#!/bin/sh\n(trap '' TERM; exec sh -c 'echo $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 600') &\nwait\n"
    )
    program.chmod(0o755)
    server = VllmServer(str(program), [], tmp_path / "log")
    eventually(pid.exists)
    server.close()
    eventually(lambda: not runs(int(pid.read_text())))
    server.close()


def test_a_killed_starter_leaves_no_server(tmp_path: Path) -> None:
    program, pids = tmp_path / "vllm", tmp_path / "pids"
    program.write_text(f'#!/bin/sh\nsleep 600 &\necho "$$ $!" >{pids}\nwait\n')
    program.chmod(0o755)
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(program), str(tmp_path / "log")], stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    starter.stdout.readline()
    eventually(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    starter.kill()
    starter.communicate()
    eventually(lambda: not [pid for pid in pids.read_text().split() if runs(int(pid))])


STARTER = """
import sys, time
from pathlib import Path
from nat_plugin_evsys.backends.vllm.server import VllmServer
server = VllmServer(sys.argv[1], [], Path(sys.argv[2]))
print("started", flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until it holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never held"
        time.sleep(0.05)
