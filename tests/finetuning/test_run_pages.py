"""The pages of a run are kept up to date, and never end it."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from made_run import MadeRun

from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
from nat_plugin_evsys.finetuning.run_pages import RunPages
from nat_plugin_evsys.report.page import Report


def test_after_an_epoch_and_at_the_end(tmp_path: Path) -> None:
    made = MadeRun(tmp_path)
    pages = RunPages(made.run_dir, made.metrics)
    made.train(1, [[made.attempt("r1", "x", float(number), number) for number in (0, 1)]])
    pages.after_epoch()
    made.finish()
    pages.write()  # waits for the one that is being written
    assert made.run_dir.plot_path.is_file()
    assert '"status":"finished"' in made.run_dir.report_path.read_text().replace(" ", "")


def test_all_drawings_use_the_same_open_fonts(tmp_path: Path) -> None:
    """matplotlib opens its fonts once a thread: 2,000 epochs once had 34 descriptors open instead of 14."""
    made = MadeRun(tmp_path)
    pages = RunPages(made.run_dir, made.metrics)
    made.train(1, [[made.attempt("r1", "x", float(number), number) for number in (0, 1)]])
    opened, done = [], threading.Event()

    def write() -> None:
        pages.write()
        opened.append(sum(each.path.endswith(".ttf") for each in psutil.Process().open_files()))
        done.wait()  # a thread that has ended leaves its identity to the next one

    with ThreadPoolExecutor(4) as threads:
        for count in range(1, 5):
            threads.submit(write)
            while len(opened) < count:
                time.sleep(0.01)
        done.set()
    assert opened[0] > 0
    assert opened == opened[:1] * 4


def test_a_report_that_cannot_be_made_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = MadeRun(tmp_path)
    made.train(1, [[made.attempt("r1", "x", float(number), number) for number in (0, 1)]])
    (made.run_dir.rollouts.directory / "epoch-0001.jsonl.gz").write_bytes(b"no gzip")
    RunPages(made.run_dir, made.metrics).write()
    assert "write_report failed; the run continues" in caplog.text
    assert made.run_dir.plot_path.is_file()


def test_of_a_run_whose_state_is_torn_until_it_is_resumed(tmp_path: Path) -> None:
    """``resume: previous`` takes an older state, which is on disk only once the run goes on; so does a policy's."""
    own = RunBooks.open(tmp_path, {}, resume=False)
    every = [own, RunBooks.of_policy(own, "checker", {})]
    for books in every:
        (books.run_dir.checkpoints_dir / "epoch-0000").mkdir()
        place = str(books.run_dir.checkpoints_dir / "epoch-0000")
        books.commit(0, "epoch-0000", place, place, None, curriculum={}, keep=2)
        books.run_dir.state_path.write_text('{"format": 1, "sta')
        books.run_dir.unlock()
    own = RunBooks.open(tmp_path, {}, resume="previous")
    for books in (own, RunBooks.of_policy(own, "checker", {})):
        pages = RunPages(books.run_dir, books.metrics)
        books.rewind()
        pages.write()
        assert '"status":"running"' in books.run_dir.report_path.read_text().replace(" ", "")


def test_whoever_stops_a_run_does_not_wait_for_a_report_that_takes_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeRun(tmp_path)
    going_on = threading.Event()
    monkeypatch.setattr(Report, "write", lambda self, target: going_on.wait())
    before = set(threading.enumerate())
    pages = RunPages(made.run_dir, made.metrics)
    (thread,) = set(threading.enumerate()) - before
    pages.write_in_time(patience=0.01)
    assert f"{made.run_dir.report_path} does not show yet how the run ended" in caplog.text
    assert f"Type: nat evsys report {made.path}" in caplog.text
    assert thread.daemon
    going_on.set()
    pages.write()
    del pages
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
