"""kill -9 at random moments of ``nat finetune``, resume, and compare with a run that was never killed.

    python benchmarks/reliability/kill_finetune.py [--small] [--kills N] [--seed S]

Each plan is a run of a toy agent with a warm start, held-out rows and a checkpoint an epoch: plainly, with overlapping
rollouts, and with the policy on a Tinker service. It is killed again and again, and resumed, until it ends. Then its
directory must hold each row, job, rollout file and checkpoint exactly once, and nothing else; and as the policy is
deterministic, the weights and counts must be those of the unbroken run, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from forked import Child, nat, preload
from served import Server

ROOT = Path(__file__).resolve().parents[2]
BASE_MODEL = "builtin/tiny"
KINDS = ("plain", "overlap", "remote")
EPOCHS = 3
ROWS, HELD_OUT, ATTEMPTS = 3, 2, 3
LIMIT_S = 300.0


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--small", action="store_true", help="10 kills")
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    kills = 10 if options.small else options.kills
    preload()
    place = Path(tempfile.mkdtemp(prefix="evsys-kills-"))
    dice = random.Random(options.seed)
    failures: list[str] = []
    done = 0
    server = Server(place, BASE_MODEL, "--deterministic")
    os.environ["TINKER_API_KEY"] = server.key
    server.start()
    try:
        for turn, kind in enumerate(KINDS):
            wanted = kills // len(KINDS) + (turn < kills % len(KINDS))
            unbroken = Plan(place / f"unbroken-{kind}", kind, server)
            life = unbroken.live_in_peace()
            print(f"{kind}: an unbroken run takes {life:.1f} s", flush=True)
            number = killed = 0
            while killed < wanted:
                number += 1
                plan = Plan(place / f"plan-{kind}-{number}", kind, server)
                times = plan.live_through_kills(dice, life, wanted - killed)
                killed += len(times)
                problems = [*plan.problems(), *plan.differences(unbroken)]
                shown = ", ".join(f"{at:.2f}" for at in times)
                print(f"  run {number}: killed after {shown or 'nothing'} s: {problems or 'whole'}", flush=True)
                failures += problems
                shutil.rmtree(plan.place)
            done += killed
    finally:
        server.stop()
        if not failures:
            shutil.rmtree(place, ignore_errors=True)
    print(f"{done} kills, {len(failures)} failures" + (f"; see {place}" if failures else ""))
    return 1 if failures else 0


class Plan:
    """One run, from its YAML to its end."""

    def __init__(self, place: Path, kind: str, server: Server) -> None:
        place.mkdir(parents=True)
        self.place = place
        self._server = server
        self.config = _write_config(place, kind, server)
        self.log = place / "log"

    def live_in_peace(self) -> float:
        """Run without a kill; the seconds that it took."""
        started = time.monotonic()
        code = self._start(resume=False).wait(LIMIT_S)
        if code != 0:
            raise SystemExit(f"the unbroken run ended with {code}:\n{self.log.read_text()[-3000:]}")
        return time.monotonic() - started

    def live_through_kills(self, dice: random.Random, life: float, most: int) -> list[float]:
        """Run and kill, at most ``most`` times, until the run has ended; when after its start each kill came."""
        killed: list[float] = []
        while True:
            child = self._start(resume=self.run is not None)
            after = dice.uniform(0.0, life) if len(killed) < most else LIMIT_S
            code = child.wait(after)
            if code is None:
                child.kill()
                child.wait(LIMIT_S)
                killed.append(after)
            elif code == 0:
                return killed
            else:
                raise SystemExit(f"a run ended with {code}:\n{self.log.read_text()[-3000:]}")

    @property
    def run(self) -> Path | None:
        """The run directory, once there is a state in it."""
        found = sorted(path.parent for path in self.place.glob("runs/run-*/state.json"))
        return found[0] if found else None

    def problems(self) -> list[str]:
        """What is there twice, or too much, or not at all."""
        run, found = self.run, []
        assert run is not None
        state = json.loads((run / "state.json").read_text())
        epochs = range(1, EPOCHS + 1)
        rows = Counter((row["event"], row["epoch"]) for row in _lines(run / "metrics.jsonl"))
        wanted = Counter([("base", 0), ("warm_start", 0), ("validation", 0)])
        wanted += Counter((event, epoch) for epoch in epochs for event in ("validation", "epoch"))
        found += _compare("rows", rows, wanted)
        jobs = Counter((job["event"], job.get("epoch")) for job in _lines(run / "jobs.jsonl"))
        trained = {row["epoch"] - 1 for row in _lines(run / "metrics.jsonl") if (row.get("job") or {}).get("job_id")}
        found += _compare("jobs", jobs, Counter((e, epoch) for epoch in trained for e in ("submitted", "finished")))
        files = Counter(path.name for path in (run / "rollouts").iterdir())
        kinds = [("base", 0), ("heldout", 0), ("train", 0), ("train", EPOCHS)]
        kinds += [(kind, epoch) for epoch in epochs for kind in ("epoch", "heldout")]
        found += _compare("rollouts", files, Counter(f"{kind}-{epoch:04d}.jsonl.gz" for kind, epoch in kinds))
        kept = Counter(path for path in (run / "checkpoints").iterdir())
        wanted = Counter(place for place in self._checkpoints() if place.is_relative_to(run))
        found += _compare("checkpoints", kept, wanted)
        found += [f"{place} is missing" for place in self._checkpoints() if not place.is_dir()]
        found += [f"left behind: {path}" for path in run.rglob(".*") if path.name != ".lock"]
        if state["status"] != "finished":
            found.append(f"status {state['status']}")
        tally = state["tally"]
        if tally["calls"] != tally["trained"] + sum(tally["dropped"].values()):
            found.append(f"calls do not add up: {tally}")
        return found

    def differences(self, other: Plan) -> list[str]:
        """What this run computed otherwise than ``other``."""
        one, two = self._result(), other._result()
        return [f"{name}: {one.get(name)} is not {two[name]}" for name in two if one.get(name) != two[name]]

    def _checkpoints(self) -> dict[Path, str]:
        """Directory and name of each checkpoint that the run knows, here or in the server's store."""
        assert self.run is not None
        found = {}
        for record in json.loads((self.run / "state.json").read_text())["checkpoints"]:
            for kind in ("adapter", "training_state"):
                where = record[kind]
                on_server = where.startswith("tinker://")
                place = self._server.checkpoint(where) if on_server else self.run / "checkpoints" / record["name"]
                found[place] = f"{kind if on_server else 'checkpoint'} {record['name']}"
        return found

    def _result(self) -> dict[str, Any]:
        assert self.run is not None
        state = json.loads((self.run / "state.json").read_text())
        rows = [row for row in _lines(self.run / "metrics.jsonl") if row["event"] == "epoch"]
        weights = {
            f"{name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for place, name in self._checkpoints().items()
            for path in sorted(place.glob("*.safetensors"))
        }
        names = ("tally", "trajectories", "heldout_reward_base", "heldout_reward_before", "heldout_reward_after")
        return {
            **weights,
            **{name: state[name] for name in (*names, "train_reward_before", "train_reward_after", "best_epoch")},
            "rewards": [row["reward_mean"] for row in rows],
            "staleness": [row["staleness"] for row in rows],
        }

    def _start(self, *, resume: bool) -> Child:
        words = ["finetune", "--config_file", str(self.config)]
        return Child(nat(*words, *(["-o", "trainers.trainer.resume", "true"] if resume else [])), self.log)


def _write_config(place: Path, kind: str, server: Server) -> Path:
    config = yaml.safe_load((ROOT / "configs" / "tiny.yml").read_text())
    data = ROOT / "examples" / "helpdesk" / "data"
    for name, count in (("train", ROWS), ("heldout", HELD_OUT)):
        (place / f"{name}.json").write_text(json.dumps(json.loads((data / f"{name}.json").read_text())[:count]))
    answers = [(row["question"], row["answer"]) for row in json.loads((data / "train.json").read_text())[:4]]
    demonstrations = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in answers
    ]
    (place / "demonstrations.json").write_text(json.dumps(demonstrations))
    policy = config["llms"]["policy"]
    policy |= {"base_model": BASE_MODEL, "output_dir": str(place / "runs"), "temperature": 1.5, "max_tokens": 4}
    policy |= {"base_url": server.url} if kind == "remote" else {"deterministic": True}
    config["eval"]["general"] |= {"output_dir": str(place / "eval"), "max_concurrency": 4}
    config["eval"]["general"]["dataset"]["file_path"] = str(place / "train.json")
    config["trajectory_builders"]["builder"]["num_generations"] = ATTEMPTS
    config["trainers"]["trainer"] |= {
        "validation_dataset": str(place / "heldout.json"),
        "validation_interval": 1,
        "overlap_rollouts": kind == "overlap",
        "warm_start": {"demonstrations": str(place / "demonstrations.json"), "batch_size": 2, "learning_rate": 1e-3},
    }
    config["finetuning"] |= {"num_epochs": EPOCHS, "output_dir": str(place / "runs")}
    path = place / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def _compare(what: str, found: Counter[Any], wanted: Counter[Any]) -> list[str]:
    more, less = found - wanted, wanted - found
    return [f"{what}: too many {dict(more)}, missing {dict(less)}"] if more or less else []


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
