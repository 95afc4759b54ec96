"""What a later turn's prompt costs: the recorded ids of the turn before, against tokenising the reply again.

    python benchmarks/epoch/turns.py tool_calling_agent
    python benchmarks/epoch/turns.py react_agent [--model builtin/tiny]

Runs `nat finetune` for an epoch after a short warm start, with the help desk's tool and NAT's own agent, and keeps the
recorded calls. The same rollouts are then taken a second time with the prompts that the chat template alone gives.
Printed for both: the share of later turns whose prompt starts with the recorded ids of the reply before; the tokens
that sampling has to read anew for them; Datums, their tokens, the distinct tokens of their prefix tree, and the
seconds of forward_backward on them. Writes benchmarks/out/turns-AGENT.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from run import ROOT

CONFIGS = {"tool_calling_agent": "helpdesk_tools.yml", "react_agent": "react.yml"}


def main() -> None:
    """Run one agent and print both columns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("agent", choices=CONFIGS)
    parser.add_argument("--model", default="builtin/smollm2-135m")
    parser.add_argument("--generations", type=int, default=6)
    parser.add_argument("--warm-epochs", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yml"
        path.write_text(yaml.safe_dump(_config(given, Path(folder))))
        calls, renderer = _rollouts(path)
    again = [replace(call, prompt_ids=renderer.render(call.messages, call.tools or None)) for call in calls]
    columns = {
        "tokenised again": _figures(again, renderer, given.model),
        "recorded ids": _figures(calls, renderer, given.model),
    }
    print(f"{given.agent} on {given.model}: {len(calls)} calls")
    for name in columns["recorded ids"]:
        print(f"{name:40s}" + "".join(f"{column[name]:16.3f}" for column in columns.values()))
    out = ROOT / "benchmarks" / "out" / f"turns-{given.agent}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(columns, indent=2) + "\n")


def _config(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / "configs" / CONFIGS[given.agent]).read_text())
    run_dir = str(folder / "run")
    config["finetuning"].update(output_dir=run_dir, num_epochs=1)
    config["llms"]["policy"].update(output_dir=run_dir, base_model=given.model, temperature=1.0, max_tokens=64)
    general = config["eval"]["general"]
    general.update(output_dir=str(folder / "eval"))
    general["dataset"]["file_path"] = str(ROOT / general["dataset"]["file_path"])
    config["trajectory_builders"]["builder"]["num_generations"] = given.generations
    config["trainer_adapters"]["adapter"]["learning_rate"] = 1e-5
    trainer = config["trainers"]["trainer"]
    del trainer["validation_dataset"], trainer["validation_interval"]
    start = trainer["warm_start"]
    start.update(epochs=given.warm_epochs, learning_rate=5e-4)
    start["demonstrations"] = str(ROOT / start["demonstrations"])
    return config


def _rollouts(config: Path) -> tuple[list[Any], Any]:
    """The calls of the training rollouts, and the renderer that made their prompts."""
    from nat.cli.main import run_cli

    from nat_plugin_evsys.policy.completions import Completion
    from nat_plugin_evsys.policy.recorder import Recorder

    calls: list[Any] = []
    renderers: list[Any] = []
    record, record_choice = Recorder.record, Completion.record

    def noted(recorder: Recorder, call: Any) -> Any:
        kept = record(recorder, call)
        if recorder.kind_of(call.run_id) == "rollout":
            calls.append(kept)
        return kept

    def noted_choice(completion: Completion, *args: Any) -> Any:
        renderers.append(completion.renderer)
        return record_choice(completion, *args)

    Recorder.record, Completion.record = noted, noted_choice  # type: ignore[method-assign, assignment]
    sys.argv = ["nat", "finetune", "--config_file", str(config)]
    try:
        run_cli()
    except SystemExit as done:
        if done.code:
            print(f"nat finetune ended with {done.code}; what was rolled out is measured nonetheless")
    return calls, renderers[-1]


def _figures(calls: list[Any], renderer: Any, model: str) -> dict[str, float]:
    from nat_plugin_evsys.engine.tree.trie import SortedSequences
    from nat_plugin_evsys.rollouts.datums import chain_datum, token_chains

    of_run: dict[str, list[Any]] = defaultdict(list)
    for call in calls:
        of_run[call.run_id].append(call)
    pairs = [pair for run in of_run.values() for pair in itertools.pairwise(run) if _follows(*pair)]
    extended = sum(_extends(before, call, renderer) for before, call in pairs)
    anew = sum(
        len(call.prompt_ids) - _shared(before.prompt_ids + before.output_ids, call.prompt_ids) for before, call in pairs
    )
    datums = [chain_datum(chain, 1.0)[0] for run in of_run.values() for chain in token_chains(run)]
    sequences = [np.asarray(datum.model_input.to_ints()) for datum in datums]
    tree = SortedSequences.build(sequences)
    return {
        "later turns": len(pairs),
        "share that extends the recorded ids": extended / max(len(pairs), 1),
        "prompt tokens read anew, later turns": anew,
        "datums": len(datums),
        "tokens": int(tree.lengths.sum()),
        "distinct tokens of the prefix tree": int((tree.lengths - tree.shared).sum()),
        "seconds of forward_backward": _seconds(datums, model),
    }


def _follows(before: Any, call: Any) -> bool:
    return len(call.messages) > len(before.messages) and call.messages[: len(before.messages)] == before.messages


def _extends(before: Any, call: Any, renderer: Any) -> bool:
    """Whether the prompt has all ids of the reply but those of a stop string and the end of the turn."""
    text = str(before.reply.get("content") or "").rstrip() if not before.reply.get("tool_calls") else None
    ids = renderer.without_stop(before.output_ids)
    while text is not None and ids and not text.startswith(renderer.decode(ids).rstrip()):
        ids = ids[:-1]
    known = before.prompt_ids + ids
    return bool(call.prompt_ids[: len(known)] == known)


def _shared(one: list[int], two: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _seconds(datums: list[Any], model: str) -> float:
    from nat_plugin_evsys import ServiceClient

    client = ServiceClient().create_lora_training_client(base_model=model, rank=32)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        client.forward_backward(datums, "importance_sampling").result()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
