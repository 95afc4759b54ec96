"""The oldest supported SDK and the newest on the package index, unmodified, against a server in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sdk_report import sdk_report
from serve_process import ServerProcess

OLDEST = "0.28.0"

MISSING = {OLDEST: {"ServiceClient.__enter__", "save_weights_and_get_sampling_client(kind=)"}}
"""What a release of the SDK does not have yet; the newest has everything."""


@pytest.fixture(params=[f"tinker=={OLDEST}", "tinker"], ids=["oldest", "newest"])
def sdk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with this release alone, to be put before the installed one."""
    target = tmp_path / "sdk"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--retries", "1", "--timeout", "15", "--target", str(target), request.param],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    # What pip prints when it got no answer at all; a release that an index lacks is a failure.
    if done.returncode and "(from versions: none)" in done.stderr:
        pytest.skip(f"pip reaches no package index: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.timeout(300)
def test_every_call_of_the_sdk_does_what_it_says(sdk: Path, open_server: ServerProcess, served_model: Path) -> None:
    report = sdk_report(open_server.url, served_model, timeout=240, PYTHONPATH=str(sdk))
    release = next(sdk.glob("tinker-*.dist-info")).name.removeprefix("tinker-").removesuffix(".dist-info")
    assert report["facts"]["tinker"] == release
    assert report["problems"] == []
    assert set(report["skipped"]) == MISSING.get(release, set())
