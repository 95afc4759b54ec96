"""What a later turn's prompt costs: with the recorded ids of the turn before, and with the reply tokenised again.

    nat finetune --config_file configs/helpdesk_tools.yml --override llms.policy.base_model builtin/smollm2-135m
    python benchmarks/epoch/turns.py .evsys/helpdesk_tools/run-…  [--seconds]

Reads the rollouts that a finished run kept and makes their prompts anew, in both ways. Printed for each: the share of
later turns whose prompt starts with all recorded ids of the reply before (but a stop string's); the prompt tokens of
later turns that sampling has not read before; Datums, their tokens, and the distinct tokens of their prefix tree, which
are what training computes. ``--seconds`` also times forward_backward on both. Writes benchmarks/out/turns-AGENT.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from nat_plugin_evsys.calls import Call
from nat_plugin_evsys.engine.model.loading import load_tokenizer
from nat_plugin_evsys.engine.tree.trie import SortedSequences
from nat_plugin_evsys.policy.chat import ChatRenderer
from nat_plugin_evsys.policy.history import History, turn_of
from nat_plugin_evsys.policy.streaming import cut_at_stop, text_ids
from nat_plugin_evsys.rollouts.datums import chain_datum, token_chains

OUT = Path(__file__).parents[1] / "out"
STOPS = {"react_agent": ["Observation:"]}
"""What NAT's agents send as ``stop``; a run does not keep it."""


class Made(NamedTuple):
    """A call with its prompt made anew, and the recorded ids that the prompt of its next turn should start with."""

    call: Call
    known: list[int]
    before: Made | None


def main() -> None:
    """Measure a run and print both columns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", action="store_true", help="time forward_backward too")
    given = parser.parse_args()
    config = yaml.safe_load((given.run / "config.yml").read_text())
    agent = config["workflow"]["_type"]
    model = next(llm["base_model"] for llm in config["llms"].values() if llm["_type"] == "evsys_policy")
    renderer = ChatRenderer(load_tokenizer(model))
    trajectories = list(_trajectories(given.run))
    columns = {}
    for name, exact in (("tokenised again", False), ("recorded ids", True)):
        made = [
            made
            for number, trajectory in enumerate(trajectories)
            for made in _calls(renderer, trajectory, f"{number}", STOPS.get(agent, []), exact=exact)
        ]
        columns[name] = _figures(made, model if given.seconds else None)
    print(f"{agent} on {model}: {len(trajectories)} rollouts\n{'':40s}" + "".join(f"{name:>18s}" for name in columns))
    for name in columns["recorded ids"]:
        print(f"{name:40s}" + "".join(f"{column[name]:18,.3f}" for column in columns.values()))
    OUT.mkdir(exist_ok=True)
    (OUT / f"turns-{agent}.json").write_text(json.dumps(columns, indent=2) + "\n")


def _trajectories(run: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((run / "rollouts").glob("epoch-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def _calls(
    renderer: ChatRenderer, trajectory: dict[str, Any], run: str, stops: list[str], *, exact: bool
) -> Iterator[Made]:
    """The calls of a rollout in their order; ATIF keeps messages, replies and sampled ids."""
    history, tools = History(), trajectory["agent"].get("tool_definitions") or []
    messages: list[dict[str, Any]] = []
    new: list[dict[str, Any]] = []  # since the last reply
    before: Made | None = None
    conversation = 0
    for step in trajectory["steps"]:
        ids = (step.get("metrics") or {}).get("completion_token_ids")
        message = _message(step)
        if ids is not None:
            extra = step["extra"]
            if extra["conversation"] == conversation:
                messages += new
            else:
                conversation, messages, before = extra["conversation"], new, None
            new = []
            prompt = history.prompt(renderer, run, messages, tools)
            texts = text_ids(renderer, ids, extra["stop_reason"], stops)
            turn = turn_of(renderer, prompt, ids, len(texts), cut_at_stop(renderer.decode(texts), stops), message)
            history.add(prompt, turn)
            prompt_ids = prompt.ids if exact else renderer.render(messages, tools or None)
            call = Call(
                call_id=extra["call_id"], index=0, run_id=run, step_id=None, policy_version=0,
                prompt_ids=prompt_ids, output_ids=ids, logprobs=step["metrics"]["logprobs"],
                stop_reason=extra["stop_reason"], temperature=1.0, top_p=1.0, messages=list(messages), tools=tools,
                reply=message, sequence=0,
            )  # fmt: skip
            kept = len(turn.ids) - len(prompt.ids)
            before = Made(call, prompt_ids + ids[:kept], before)
            yield before
        (new if ids is None else messages).append(message)
        results = (step.get("observation") or {}).get("results") or []
        new += [{"role": "tool", "tool_call_id": r["source_call_id"], "content": r["content"]} for r in results]


def _message(step: dict[str, Any]) -> dict[str, Any]:
    role = {"agent": "assistant"}.get(step["source"], step["source"])
    calls = [
        {
            "id": call["tool_call_id"],
            "type": "function",
            "function": {
                "name": call["function_name"],
                "arguments": (call.get("extra") or {}).get("raw_arguments") or json.dumps(call["arguments"]),
            },
        }
        for call in step.get("tool_calls") or []
    ]
    return {"role": role, "content": step["message"], **({"tool_calls": calls} if calls else {})}


def _figures(made: list[Made], model: str | None) -> dict[str, float]:
    later = [each for each in made if each.before is not None]
    extended = sum(each.call.prompt_ids[: len(each.before.known)] == each.before.known for each in later if each.before)
    of_run: dict[str, list[Call]] = defaultdict(list)
    for each in made:
        of_run[str(each.call.run_id)].append(each.call)
    datums = [chain_datum(chain, 1.0)[0] for run in of_run.values() for chain in token_chains(run)]
    tree = SortedSequences.build([np.asarray(datum.model_input.to_ints()) for datum in datums])
    figures: dict[str, float] = {
        "later turns": len(later),
        "share that extends the recorded ids": extended / max(len(later), 1),
        "prompt tokens of later turns": sum(len(each.call.prompt_ids) for each in later),
        "of them not read before": sum(_unread(each) for each in later),
        "datums": len(datums),
        "tokens": int(tree.lengths.sum()),
        "distinct tokens of the prefix tree": int((tree.lengths - tree.shared).sum()),
    }
    return figures if model is None else {**figures, "seconds of forward_backward": _seconds(datums, model)}


def _unread(made: Made) -> int:
    assert made.before is not None
    read, ids = made.before.call.prompt_ids + made.before.call.output_ids, made.call.prompt_ids
    same = next((at for at, (a, b) in enumerate(zip(read, ids, strict=False)) if a != b), min(len(read), len(ids)))
    return len(ids) - same


def _seconds(datums: list[Any], model: str) -> float:
    from nat_plugin_evsys import ServiceClient

    client = ServiceClient().create_lora_training_client(base_model=model, rank=32)
    client.forward_backward(datums[:1], "importance_sampling").result()
    start = time.perf_counter()
    client.forward_backward(datums, "importance_sampling").result()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
