"""The books of a run that was killed: what the committed state does not know is gone when it is resumed."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nat_plugin_evsys.calls import CallTally, DropReason
from nat_plugin_evsys.errors import CheckpointError
from nat_plugin_evsys.finetuning.bookkeeping import RunBooks
from nat_plugin_evsys.finetuning.workflow.policy_rollouts import RolloutReport
from nat_plugin_evsys.policy.recorder import RecorderTotals
from nat_plugin_evsys.report.summary import RunSummary
from nat_plugin_evsys.runs.rollouts import Collection
from nat_plugin_evsys.training.job_ledger import JobLedger

CONFIG: dict[str, Any] = {"trainers": {"t": {"seed": 0}}}


def begin(books: RunBooks) -> None:
    """What a run does before its first checkpoint."""
    books.metrics.append("base", 0, reward=0.0)
    books.metrics.append("warm_start", 0, steps=1)
    books.metrics.append("validation", 0, reward=0.1)
    for kind in ("base", "heldout", "train"):
        books.run_dir.rollouts.write(Collection(kind, 0), ["{}"])  # type: ignore[arg-type]
    books.state.warm_started, books.state.heldout_reward_before = True, 0.1


def save(books: RunBooks, epoch: int) -> None:
    """What an epoch does before its commit."""
    name = f"epoch-{epoch:04d}"
    if epoch > 0:
        books.run_dir.rollouts.write(Collection("epoch", epoch), ["{}"])
        JobLedger(books.run_dir.path).submitted(f"job-{epoch}", "run", epoch=epoch - 1)
        books.metrics.append("epoch", epoch, reward_mean=0.5)
    (books.run_dir.checkpoints_dir / name).mkdir()
    (books.run_dir.checkpoints_dir / name / "manifest.json").write_text("{}")


def commit(books: RunBooks, epoch: int) -> None:
    save(books, epoch)
    path = str(books.run_dir.checkpoints_dir / f"epoch-{epoch:04d}")
    books.commit(epoch, f"epoch-{epoch:04d}", path, path, None, curriculum={}, keep=2)


def resumed(output_dir: Path, books: RunBooks, resume: Any = True) -> RunBooks:
    """Another process's books on the same run."""
    books.run_dir.unlock()
    again = RunBooks.open(output_dir, CONFIG, resume=resume)
    again.rewind()
    return again


@pytest.mark.parametrize("saved", [False, True])
def test_killed_before_the_first_commit_nothing_has_happened(tmp_path: Path, saved: bool) -> None:
    killed = RunBooks.open(tmp_path, CONFIG, resume=False)
    begin(killed)
    if saved:
        save(killed, 0)
    books = resumed(tmp_path, killed)
    assert books.metrics.rows() == []
    assert books.run_dir.rollouts.collections() == []
    assert list(books.run_dir.checkpoints_dir.iterdir()) == []
    assert not books.has_trained
    begin(books)
    commit(books, 0)
    assert [row["event"] for row in books.metrics.rows()] == ["base", "warm_start", "validation"]


def test_killed_in_an_epoch_the_committed_one_stays(tmp_path: Path) -> None:
    killed = RunBooks.open(tmp_path, CONFIG, resume=False)
    begin(killed)
    commit(killed, 0)
    commit(killed, 1)
    save(killed, 2)
    books = resumed(tmp_path, killed)
    assert [row["epoch"] for row in books.metrics.rows()] == [0, 0, 0, 1]
    assert [record["job_id"] for record in JobLedger(books.run_dir.path).read()] == ["job-1"]
    assert str(books.run_dir.rollouts.collections()[-1]) == "epoch-0001"
    assert sorted(path.name for path in books.run_dir.checkpoints_dir.iterdir()) == ["epoch-0000", "epoch-0001"]


def test_an_interrupted_run_keeps_what_was_committed_and_nothing_since(tmp_path: Path) -> None:
    books = RunBooks.open(tmp_path, CONFIG, resume=False)
    begin(books)
    books.stop("interrupted", "SIGTERM")
    again = resumed(tmp_path, books)
    assert not again.state.warm_started
    assert again.state.heldout_reward_before is None


def test_falling_back_goes_one_committed_epoch_at_a_time(tmp_path: Path) -> None:
    books = RunBooks.open(tmp_path, CONFIG, resume=False)
    for epoch in range(3):
        commit(books, epoch)
    names = [f"epoch-000{epoch}" for epoch in range(3)]
    assert books.fall_back()
    assert books.state.epochs_done == 1
    assert books.fall_back()
    assert not books.fall_back()
    assert books.state.epochs_done == 0
    # What is left may not load either, so nothing is removed before it has.
    assert [row["epoch"] for row in books.metrics.rows()] == [1, 2]
    assert sorted(path.name for path in books.run_dir.checkpoints_dir.iterdir()) == names
    assert resumed(tmp_path, books).state.epochs_done == 2
    books.rewind()
    assert books.metrics.rows() == []
    assert sorted(path.name for path in books.run_dir.checkpoints_dir.iterdir()) == names[:1]


def test_a_checkpoint_that_someone_deletes_is_not_named_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    books = RunBooks.open(tmp_path, CONFIG, resume=False)
    commit(books, 0)
    commit(books, 1)
    for path in (books.run_dir.checkpoints_dir / "epoch-0000").iterdir():
        path.unlink()
    (books.run_dir.checkpoints_dir / "epoch-0000").rmdir()
    commit(books, 2)
    assert [record.epoch for record in books.state.checkpoints] == [1, 2]
    assert "checkpoint epoch-0000 is no longer in" in caplog.text


def test_a_further_policy_is_brought_to_where_the_run_is(tmp_path: Path) -> None:
    own = RunBooks.open(tmp_path, CONFIG, resume=False)
    other = RunBooks.of_policy(own, "checker", CONFIG)
    for books in (other, own):
        commit(books, 0)
    for epoch in (1, 2):
        other.state.tally["calls"] = epoch
        commit(other, epoch)
    commit(own, 1)  # and the process was killed before it committed epoch 2

    other.run_dir.unlock()
    again = RunBooks.of_policy(own, "checker", CONFIG)
    assert again.state.epochs_done == 2
    again.go_to(own.state.committed_epoch)
    again.rewind()
    assert (again.state.epochs_done, again.state.status) == (1, "running")
    assert [row["epoch"] for row in again.metrics.rows()] == [1]
    assert sorted(path.name for path in again.run_dir.checkpoints_dir.iterdir()) == ["epoch-0000", "epoch-0001"]
    with pytest.raises(CheckpointError, match="policies/checker has no state of epoch 2"):
        again.go_to(2)
    again.go_to(-1)
    again.rewind()
    assert again.state.last_checkpoint() is None
    assert again.metrics.rows() == []
    assert list(again.run_dir.checkpoints_dir.iterdir()) == []


def test_a_stopped_run_has_a_summary_until_it_is_resumed(tmp_path: Path) -> None:
    books = RunBooks.open(tmp_path, CONFIG, resume=False)
    commit(books, 0)
    books.count_rollouts(RolloutReport(tally=CallTally(calls=5, dropped=Counter({DropReason.NO_CALLS: 2}))))
    books.stop("interrupted", "Ctrl-C")
    summary = RunSummary.read(books.run_dir.summary_path)
    assert (summary.status, summary.error, summary.calls) == ("interrupted", "Ctrl-C", 5)
    assert summary.dropped == {"no_calls": 2, "job_canceled": 3}
    assert "Interrupted after 0 epochs" in summary.format(books.run_dir.summary_path)
    again = resumed(tmp_path, books)
    assert not again.run_dir.summary_path.exists()
    assert again.state.tally["calls"] == 0


def test_killed_between_the_last_commit_and_the_summary_the_last_measurement_counts_once(tmp_path: Path) -> None:
    books = RunBooks.open(tmp_path, CONFIG, resume=False)
    commit(books, 0)
    measured = RolloutReport(tally=CallTally(calls=3, dropped=Counter({DropReason.VALIDATION: 3})))
    books.count_rollouts(measured)
    books.finish("nat run", {})
    books.run_dir.unlock()

    again = RunBooks.open(tmp_path, CONFIG, resume=True)
    assert again.is_finished
    assert again.state.tally["calls"] == 3
    again.run_dir.summary_path.unlink()
    assert not again.is_finished
    again.undo_finish()
    again.rewind()
    assert again.state.tally["calls"] == 0
    again.count_rollouts(measured)
    assert again.finish("nat run", {}).calls == 3


def test_calls_of_no_rollout_are_committed_with_each_epoch_and_counted_once(tmp_path: Path) -> None:
    def totals(calls: int, refused: int, answered: int = 0) -> RecorderTotals:
        return RecorderTotals(0, calls, 0, 0, {DropReason.REQUEST_REFUSED: refused}, answered, {"no": refused})

    books = RunBooks.open(tmp_path, CONFIG, resume=False)
    books.count_stray_calls(totals(1, 2), [totals(0, 0, answered=3)])
    commit(books, 0)
    books.count_stray_calls(totals(2, 4), [totals(0, 0, answered=3)])
    commit(books, 1)
    books.count_stray_calls(totals(9, 9), [])
    books.stop("interrupted", "Ctrl-C")
    stopped = RunSummary.read(books.run_dir.summary_path)
    assert stopped.dropped == {"unattributed": 9, "request_refused": 9, "not_targeted": 3}

    again = resumed(tmp_path, books)
    again.count_stray_calls(totals(0, 1), [])
    again.count_stray_calls(totals(0, 1), [])
    summary = again.finish("nat run", {})
    assert summary.dropped == {"unattributed": 2, "request_refused": 5, "not_targeted": 3}
    assert summary.calls == 10


@pytest.mark.parametrize("epochs", [1, 0])
def test_a_last_checkpoint_that_someone_deletes_is_said_with_the_resume_that_works(tmp_path: Path, epochs: int) -> None:
    books = RunBooks.open(tmp_path, CONFIG, resume=False)
    for epoch in range(epochs + 1):
        commit(books, epoch)
    shutil.rmtree(books.run_dir.checkpoints_dir / f"epoch-{epochs:04d}")
    wanted = r"was deleted .* \(of epoch 0; .* resume: previous" if epochs else "was deleted .* resume: false"
    with pytest.raises(CheckpointError, match=wanted):
        books.finish("nat run", {})
    books.stop("failed", "a checkpoint was deleted")
    assert resumed(tmp_path, books, "previous").fall_back() is bool(epochs)
