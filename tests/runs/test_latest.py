"""Which run `latest` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from nat_plugin_evsys.runs import RunDirectory, latest_to_serve, latest_to_show, newer_runs_notice, resolve_checkpoint
from nat_plugin_evsys.runs.state import RunStatus


def made(output_dir: Path, status: RunStatus, epochs: int, *, warm_started: bool = False) -> RunDirectory:
    """A run that ended with this status after so many epochs."""
    run = RunDirectory.create(output_dir)
    run.state.status, run.state.epochs_done = status, epochs
    for epoch in range(epochs + 1):
        path = run.checkpoints_dir / f"epoch-{epoch}"
        path.mkdir()
        (path / "manifest.json").write_text("{}")
        run.record_checkpoint(path.name, epoch, 0.1 * epoch, trained=epoch > 0 or warm_started)
    run.save_state()
    run.unlock()
    return run


# The runs, oldest first, and the positions of those that `latest` means to show and to serve (None: there is none).
# fmt: off
CASES: dict[str, tuple[list[tuple[RunStatus, int, bool]], int, int | None]] = {
    "the newest": ([("finished", 2, False), ("finished", 1, False)], 1, 1),
    "interrupted during its first epoch": ([("finished", 2, False), ("interrupted", 0, False)], 0, 0),
    "interrupted after its warm start": ([("finished", 2, True), ("interrupted", 0, True)], 0, 0),
    "interrupted later": ([("finished", 2, False), ("interrupted", 1, False)], 1, 1),
    "killed": ([("finished", 2, False), ("running", 0, True)], 0, 0),
    "failed: shown, since somebody wants to see why": ([("finished", 2, False), ("failed", 0, True)], 1, 0),
    "only an interrupted one, with a warm start": ([("interrupted", 0, True)], 0, 0),
    "only an interrupted one": ([("interrupted", 0, False)], 0, None),
}
# fmt: on


@pytest.mark.parametrize("name", CASES)
def test_which_run_it_is_and_what_is_said(tmp_path: Path, name: str) -> None:
    states, shown, served = CASES[name]
    runs = [made(tmp_path, status, epochs, warm_started=warm) for status, epochs, warm in states]
    show, serve = latest_to_show(tmp_path), latest_to_serve(tmp_path)
    assert show is not None
    assert show.run.path == runs[shown].path
    if served is None:
        assert serve is None
        return
    assert serve is not None
    assert serve.run.path == runs[served].path
    for latest in (show, serve):
        assert (latest.notice is None) == (latest.run.path == runs[-1].path)
        if latest.notice is not None:
            assert f"`latest` is {latest.run.path.name} (finished after 2 epochs)" in latest.notice
            assert runs[-1].path.name in latest.notice
    chosen = resolve_checkpoint(tmp_path, "latest")
    assert isinstance(chosen, Path)
    assert chosen.is_relative_to(runs[served].path)
    assert newer_runs_notice(tmp_path, str(chosen)) is None
    assert (newer_runs_notice(tmp_path, "latest") is None) == (serve.notice is None)


def test_a_run_that_goes_on_is_shown_and_not_served(tmp_path: Path) -> None:
    finished = made(tmp_path, "finished", 1)
    running = RunDirectory.create(tmp_path)
    show, serve = latest_to_show(tmp_path), latest_to_serve(tmp_path)
    assert show is not None
    assert serve is not None
    assert (show.run.path, serve.run.path) == (running.path, finished.path)
    assert serve.notice is not None
    assert f"{running.path.name} (running after 0 epochs)" in serve.notice
    running.unlock()


def test_no_runs(tmp_path: Path) -> None:
    assert latest_to_show(tmp_path) is None
    assert latest_to_serve(tmp_path) is None
    assert newer_runs_notice(tmp_path, "latest") is None
