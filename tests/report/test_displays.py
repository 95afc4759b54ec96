"""The display: plain lines in a pipe, a live line on a terminal, and NAT's own bars silenced."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nat.data_models.evaluator import EvalInput, EvalInputItem
from nat.data_models.finetuning import TrainingJobStatus, TrainingStatusEnum
from nat.plugins.eval.data_models.evaluator_io import EvalOutputItem
from nat.plugins.eval.evaluator import base_evaluator
from nat.plugins.eval.evaluator.base_evaluator import BaseEvaluator
from nat.plugins.eval.runtime import evaluate
from tqdm import tqdm

from nat_plugin_evsys.report.display import Display
from nat_plugin_evsys.report.displays import PlainDisplay, create_display
from nat_plugin_evsys.report.findings import Finding, FindingId
from nat_plugin_evsys.report.quiet import quiet_tqdm
from nat_plugin_evsys.report.replies import Reply
from nat_plugin_evsys.report.texts import epoch_text

ROW = {
    "reward_mean": 0.5,
    "reward_min": 0.0,
    "reward_max": 1.0,
    "rollout_seconds": 1.0,
    "training_seconds": 2.5,
    "job": {"loss": -0.25, "trained": 6, "dropped": {"x": 2}},
}


def job(progress: float, status: TrainingStatusEnum = TrainingStatusEnum.RUNNING) -> TrainingJobStatus:
    metadata = {"phase": "training", "step": int(progress // 25), "steps": 4, "loss": -0.1, "tokens_per_second": 950.4}
    return TrainingJobStatus(run_id="r", backend="evsys", status=status, progress=progress, metadata=metadata)


def use(progress: Display) -> None:
    """What a trainer does in one epoch."""
    with progress:
        progress.validation(0, 0.125)
        progress.phase("warm start", "demonstrations.json")
        for step in range(1, 41):
            progress.steps(step, 40, f"loss {2 - step / 40:.3f}")
        progress.phase("rollouts", "epoch 1/4")
        for done in range(101):
            progress.rollouts(done, 100)
        progress.phase("training", "epoch 1/4")
        for percent in range(100):
            progress.job(job(percent))
        progress.job(job(100, TrainingStatusEnum.COMPLETED))
        progress.epoch_done(1, 4, ROW)
        progress.close()


def test_plain_lines_are_few_and_say_it_all() -> None:
    stream = io.StringIO()
    use(create_display("auto", stream))
    lines = [line.split("] ", 1)[1] for line in stream.getvalue().splitlines()]
    assert lines == [
        "held-out reward 0.125 before training",
        "warm start, demonstrations.json",
        "warm start, demonstrations.json: step 40/40, loss 1.000",
        "rollouts, epoch 1/4",
        "rollouts, epoch 1/4: 100/100 rollouts",
        "training, epoch 1/4",
        "training, epoch 1/4: training 100%, step 4/4, loss -0.1000, 950 tokens/s",
        "epoch 1/4 done: sampled reward 0.500 (0.000 to 1.000), loss -0.2500, 6 calls trained, 2 dropped, 3.5 s",
    ]


def test_an_epoch_says_its_rate_and_how_far_it_moved_the_policy() -> None:
    job = {
        "loss": -0.25,
        "trained": 6,
        "dropped": {},
        "metrics": {"learning_rate": 0.00031250001, "kl_moved": 0.000421},
    }
    assert epoch_text(2, 4, {"job": job}) == (
        "epoch 2/4 done: loss -0.2500, 6 calls trained, learning rate 0.000313, KL 0.00042"
    )
    assert epoch_text(2, 4, {"job": {**job, "trained": 0}}) == "epoch 2/4 done: loss -0.2500, 0 calls trained"


def test_plain_updates_come_at_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("nat_plugin_evsys.report.displays.time.monotonic", lambda: now)
    stream = io.StringIO()
    progress = PlainDisplay(stream, interval=10.0)
    progress.phase("rollouts")
    for second in range(1, 36):
        now = float(second)
        progress.rollouts(second, 100)
    shown = re.findall(r"(\d+)/100", stream.getvalue())
    assert shown == ["10", "20", "30"]


FINDING = Finding(
    FindingId.SAME_REWARD,
    1,
    "Every reward of epoch 1 is 0.000.",
    "Compare the replies.",
    [Reply("3", "[bold]Wifi?", "network", "It is broken.", 0.0, "mode: exact", 4, 1, 0)],
)


def test_a_finding_is_indented_below_its_first_line() -> None:
    stream = io.StringIO()
    create_display("plain", stream).finding(FINDING)
    first, *others = stream.getvalue().splitlines()
    stamp, sentence = first.split("] ", 1)
    assert sentence == "! Every reward of epoch 1 is 0.000."
    indent = " " * (len(stamp) + 2)
    assert others == [
        f"{indent}  Compare the replies.",
        f'{indent}  row 3 asks "[bold]Wifi?" and wants "network"',
        f'{indent}    reply "It is broken.": reward 0.000, mode: exact',
    ]


def test_without_a_display_a_finding_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    create_display("none").finding(FINDING)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("! Every reward of epoch 1 is 0.000.")


def test_a_finding_on_a_terminal_is_whole_and_coloured() -> None:
    code = """
from nat_plugin_evsys.report.displays import create_display
from nat_plugin_evsys.report.findings import Finding, FindingId
with create_display("rich") as progress:
    progress.phase("rollouts", "epoch 1/1")
    progress.finding(Finding(FindingId.CUT_OFF, 1, "The [bold]sentence.", "The advice."))
"""
    shown, _ = in_terminal(code)
    assert "\x1b[1;33m! The [bold]sentence." in shown
    assert "The advice." in shown


def test_a_failed_job_shows_its_cause() -> None:
    stream = io.StringIO()
    status = TrainingJobStatus(run_id="r", backend="b", status=TrainingStatusEnum.FAILED, message="loss was nan")
    create_display("plain", stream).job(status)
    assert "failed, loss was nan" in stream.getvalue()


def test_none_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    use(create_display("none"))
    assert capfd.readouterr() == ("", "")


def in_terminal(code: str) -> tuple[str, str]:
    """Run code with stderr on a pseudo-terminal; what the terminal and what stdout received."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=slave, text=True, env=environment
    )
    os.close(slave)
    shown = bytearray()
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # Linux: the other end was closed
        pass
    os.close(master)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, shown.decode()
    return shown.decode(), out


def test_rich_on_a_terminal_keeps_log_lines_whole_and_cleans_up() -> None:
    code = """
import logging, sys, time
logging.basicConfig(level="INFO", format="LOG %(message)s")   # as NAT does: a handler on the stderr of now
handler = logging.getLogger().handlers[0]
before = handler.stream
from nat_plugin_evsys.report.displays import create_display
with create_display("auto") as progress:
    progress.phase("rollouts", "epoch 1/1")
    for done in range(1, 9):
        progress.rollouts(done, 8)
        logging.info("rollout %d scored", done)
        time.sleep(0.05)
    progress.epoch_done(1, 1, {"reward_mean": 0.5})
    progress.validation(1, 0.75)
    assert handler.stream is not before
assert handler.stream is before
logging.info("afterwards")
print("stdout is ours alone")
"""
    shown, out = in_terminal(code)
    assert out == "stdout is ours alone\n"
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n")
    lines = [line.strip() for line in plain.split("\n")]
    for number in range(1, 9):
        assert f"LOG rollout {number} scored" in lines
    assert "epoch 1/1 done: sampled reward 0.500" in lines
    assert "held-out reward 0.750 after 1 epoch" in lines
    assert any("rollouts, epoch 1/1" in line and "8/8 rollouts" in line for line in lines)
    assert shown.index("\x1b[?25l") < shown.rindex("\x1b[?25h")  # the cursor came back
    assert [line for line in lines if line][-1] == "LOG afterwards"


def test_plain_in_a_pipe_has_no_control_characters() -> None:
    code = "from nat_plugin_evsys.report.displays import create_display\nwith create_display() as p: p.phase('a', 'b')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\[evsys +\d+\.\ds\] a, b\n", shown.stderr)
    assert shown.stdout == ""


class Length(BaseEvaluator):
    async def evaluate_item(self, item: EvalInputItem) -> EvalOutputItem:
        return EvalOutputItem(id=item.id, score=1.0, reasoning={})


async def score() -> float | None:
    item = EvalInputItem(id=1, input_obj="a", expected_output_obj="a", output_obj="a", full_dataset_entry={})
    return (await Length().evaluate(EvalInput(eval_input_items=[item]))).average_score


async def test_quiet_tqdm_silences_nats_bars_and_only_them(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_tqdm():
        assert await score() == 1.0
        evaluate.tqdm(total=1, desc="Running workflow").close()
        assert capfd.readouterr().err == ""
        tqdm(total=1, desc="a user's own").close()
        assert "a user's own" in capfd.readouterr().err
    assert await score() == 1.0
    assert "Evaluating" in capfd.readouterr().err
    assert evaluate.tqdm is tqdm
    assert base_evaluator._tqdm is tqdm


@pytest.mark.parametrize("order", [lambda a, b: (a, b), lambda a, b: (b, a)])
def test_quiet_tqdm_overlapping_uses_restore_in_any_order(order: Callable) -> None:
    first, second = quiet_tqdm(), quiet_tqdm()
    first.__enter__()
    second.__enter__()
    one, other = order(first, second)
    one.__exit__(None, None, None)
    assert evaluate.tqdm is not tqdm
    other.__exit__(None, None, None)
    assert evaluate.tqdm is tqdm


def test_quiet_tqdm_restores_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), quiet_tqdm():
        raise RuntimeError
    assert evaluate.tqdm is tqdm
