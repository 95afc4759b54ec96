"""The result of a run: ``summary.json`` and the closing text."""

from __future__ import annotations

import atexit
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from nat_plugin_evsys.calls import CallTally
from nat_plugin_evsys.errors import DataError, visible
from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import to_json
from nat_plugin_evsys.report.drop_reasons import drop_reason_meanings
from nat_plugin_evsys.report.findings import Finding, finding_text, findings_of
from nat_plugin_evsys.report.prompts import TOKENISED_AGAIN, extended_share, total_prompts
from nat_plugin_evsys.runs.directory import RunDirectory
from nat_plugin_evsys.runs.state import RunState, RunStatus


@dataclass(slots=True)
class RunSummary:
    """What a run did. Rewards are means, or None if nothing was measured.

    Attributes:
        heldout_reward_base: of the base model, if ``heldout_reward_before`` is the one after a warm start.
        seconds: time of the run, over all of its sessions.
        calls: LLM calls that the training rollouts made.
        trained: calls that were trained on.
        dropped: reason -> calls that were not; ``trained + sum(dropped.values()) == calls``.
        adapter: location of the adapter.
        better: which checkpoint earned more than the last one, if one did; ``checkpoint: best`` serves it.
        trajectories: ``{"trained": n, "dropped": {reason: n}}``.
        epochs: epochs finished.
        serve_command: what to type to serve the adapter.
        run_dir: the run directory.
        trackers: name -> where it shows the run, how many records it received and lost, and why it lost the first.
        refusals: message -> requests that the policy endpoint refused with it (numbers in it are the first one's), in
            the run's last session.
        prompts: how the prompts of the training rollouts hold the turn before them (``PromptHistory``) -> their number.
        malformed_calls: what looked like a tool call in those rollouts, could not be read as one, and stayed text.
        findings: what a person should look at, each as its first epoch showed it, with the ``epochs`` that have it.
        policy: whose summary it is, if the run trains several policies.
        status, error: how the run ended, and why it did not finish. Of one that was stopped, ``calls`` also has those
            of the epoch that did not end; a resumed run counts anew from its last checkpoint.
    """

    train_reward_before: float | None
    train_reward_after: float | None
    heldout_reward_before: float | None
    heldout_reward_after: float | None
    seconds: float
    calls: int
    trained: int
    dropped: dict[str, int]
    adapter: str | None
    trajectories: dict[str, Any] = field(default_factory=lambda: {"trained": 0, "dropped": {}})
    epochs: int = 0
    serve_command: str | None = None
    run_dir: str | None = None
    heldout_reward_base: float | None = None
    trackers: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    malformed_calls: int = 0
    policy: str | None = None
    better: str | None = None
    status: RunStatus = "finished"
    error: str | None = None

    @classmethod
    def of(
        cls,
        run_dir: RunDirectory,
        rows: Sequence[Mapping[str, Any]],
        tally: CallTally,
        *,
        trajectories: dict[str, Any],
        refusals: dict[str, int],
        policy: str | None,
        serve_command: str | None,
        trackers: dict[str, dict[str, Any]],
        has_adapter: bool,
    ) -> RunSummary:
        """The summary of a run in its present state.

        Args:
            rows: those of metrics.jsonl.
            has_adapter: whether the last checkpoint was trained.
        """
        state = run_dir.state
        record = state.last_checkpoint() if has_adapter else None
        return cls(
            train_reward_before=state.train_reward_before,
            train_reward_after=state.train_reward_after,
            heldout_reward_base=state.heldout_reward_base,
            heldout_reward_before=state.heldout_reward_before,
            heldout_reward_after=state.heldout_reward_after,
            seconds=round(state.seconds, 3),
            calls=tally.calls,
            trained=tally.trained,
            dropped={reason.value: calls for reason, calls in tally.dropped.items()},
            adapter=None if record is None else str(run_dir.locate(record.adapter)),
            trajectories=trajectories,
            epochs=state.epochs_done,
            serve_command=None if record is None else serve_command,
            run_dir=str(run_dir.path),
            trackers=trackers,
            refusals=refusals,
            findings=[{**finding.to_dict(), "epochs": epochs} for finding, epochs in findings_of(rows)],
            prompts=total_prompts(rows),
            malformed_calls=sum(row.get("malformed_calls", 0) for row in rows),
            policy=policy,
            better=None if record is None else _better(state),
            status=state.status,
            error=state.error,
        )

    def write(self, path: Path) -> None:
        """Write ``summary.json`` atomically."""
        atomic_write(path, to_json(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> RunSummary:
        """The summary at ``path``.

        Raises:
            DataError: missing, or not a summary.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{item.name: data[item.name] for item in fields(cls) if item.name in data})
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} is not a run's summary: {error!r}") from error

    def format(self, path: Path) -> str:
        """The text that ends a run; its last line is ``path``, where the summary was written."""
        trajectories = self.trajectories
        lines = [
            *([] if self.policy is None else [f"Policy {self.policy}"]),
            self._how_it_ended(),
            f"  training reward  {_change(self.train_reward_before, self.train_reward_after)}",
            f"  held-out reward  {self._heldout_change()}",
            "    (one attempt a row at eval_temperature, 0 is greedy; the epochs' sampled rewards are of all rollouts)",
            f"  trajectories     {trajectories['trained']} trained, {_dropped(trajectories['dropped'])}",
            f"  calls            {self.calls} made, {self.trained} trained, {_dropped(self.dropped)}",
            *self._why_dropped(),
            *self._later_turns(),
            *self._malformed_calls(),
            f"  adapter          {self.adapter or self._why_no_adapter()}",
        ]
        if self.run_dir is not None and (Path(self.run_dir) / "report.html").is_file():
            lines.append(f"  report           {Path(self.run_dir) / 'report.html'}")
        if self.serve_command:
            lines.append(f"  serve it with    {self.serve_command}")
        if self.better is not None:
            lines.append(f"  better           {self.better}; `checkpoint: best` of the policy serves that one")
        lines += [f"  {name:<16} {_tracked(count)}" for name, count in self.trackers.items()]
        lines += [f"  refused          {number} x: {message}" for message, number in self.refusals.items()]
        lines += [_finding(data, self.epochs) for data in self.findings]
        return visible("\n".join([*lines, str(path)]))

    def _how_it_ended(self) -> str:
        if self.status == "finished":
            return f"Finished {_count(self.epochs, 'epoch')} in {self.seconds:.1f} s"
        return f"{self.status.capitalize()} after {_count(self.epochs, 'epoch')}, {self.seconds:.1f} s: {self.error}"

    def _heldout_change(self) -> str:
        base, before, after = self.heldout_reward_base, self.heldout_reward_before, self.heldout_reward_after
        if base is None:
            return _change(before, after)
        gain = "" if after is None else f"  ({after - base:+.3f})"
        if after is not None and before is not None and self.epochs:
            gain += f", {after - before:+.3f} since the warm start"
        return f"base {_reward(base)} -> warm start {_reward(before)} -> {_reward(after)}{gain}"

    def _why_dropped(self) -> list[str]:
        """A line for each reason: what it means."""
        meanings = drop_reason_meanings()
        reasons = dict.fromkeys((*_most_first(self.trajectories["dropped"]), *_most_first(self.dropped)))
        return [f"    {reason}: {meanings[reason]}" for reason in reasons if reason in meanings]

    def _later_turns(self) -> list[str]:
        share = extended_share(self.prompts)
        if share is None:
            return []
        others = ", ".join(f"{self.prompts[name]} {name}" for name in TOKENISED_AGAIN if self.prompts.get(name))
        return [f"  later turns      {share:.1%} start with the recorded ids{f' ({others})' if others else ''}"]

    def _malformed_calls(self) -> list[str]:
        if not self.malformed_calls:
            return []
        return [
            f"  malformed calls  {self.malformed_calls} looked like a tool call, could not be read, and stayed text"
        ]

    def _why_no_adapter(self) -> str:
        return "none was saved" if self.trained else "none: nothing was trained"


def _better(state: RunState) -> str | None:
    """``the policy of epoch 4, whose reward was 0.750 (…)``, if a checkpoint earned more than the last one."""
    best, last = state.best_checkpoint(), state.last_checkpoint()
    if best is None or last is None or best.reward is None or last.reward is None or best.reward <= last.reward:
        return None
    return f"{best.policy}, whose reward was {best.reward:.3f} (the last one's is {last.reward:.3f})"


def print_at_exit(text: str) -> None:
    """Print ``text`` to stdout when the process ends, after everything that NAT logs once a run is over."""

    def write() -> None:
        sys.stderr.flush()
        write_anything(sys.stdout)
        print(text, flush=True)

    atexit.register(write)


def write_anything(stream: TextIO) -> None:
    """Let ``stream`` show as ``?`` what its encoding has no character for, in place of failing: ASCII locales exist."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def _tracked(count: dict[str, Any]) -> str:
    """``https://… (412 records)``, or what was lost and why."""
    lost = f", {count['lost']} lost: {count['error']}" if count["error"] else ""
    return f"{count['where'] or 'not reached'} ({_count(count['sent'], 'record')}{lost})"


def _finding(data: dict[str, Any], last_epoch: int) -> str:
    finding, epochs = Finding.from_dict(data), data["epochs"]
    again = f"\n  The same in {_count(len(epochs) - 1, 'more epoch')}." if len(epochs) > 1 else ""
    since = "\n  Later epochs do not show it." if max(epochs) < last_epoch else ""
    return finding_text(finding, examples=1) + again + since


def _change(before: float | None, after: float | None) -> str:
    if before is None and after is None:
        return "not measured"
    gain = f"  ({after - before:+.3f})" if before is not None and after is not None else ""
    return f"{_reward(before)} -> {_reward(after)}{gain}"


def _reward(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _dropped(reasons: dict[str, int]) -> str:
    total = sum(reasons.values())
    if not total:
        return "0 dropped"
    parts = (f"{name} {reasons[name]}" for name in _most_first(reasons))
    return f"{total} dropped ({', '.join(parts)})"


def _most_first(reasons: dict[str, int]) -> list[str]:
    return sorted(reasons, key=lambda name: (-reasons[name], name))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
