"""kill -9 of ``nat evsys serve`` at random moments, while clients train, sample and save; then everything is checked.

    python benchmarks/reliability/kill_serve.py [--small] [--kills N] [--clients N] [--seed S]

The clients use the unmodified ``tinker`` SDK, and note each operation before they send it and each answer. The server
is started again on the same store and port after each kill, and lives until clients are at work and some time more. At
the end the server's log of every model must be what its client sent, in order, with nothing lost and nothing twice;
every answer that a client got must be the one in the log; and a fresh engine that runs the log must arrive at the
server's weights and moments, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from forked import preload
from served import LIMIT_S, Server, tail

SUPPORT = Path(__file__).resolve().parents[2] / "tests" / "support"
sys.path.insert(0, str(SUPPORT))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--small", action="store_true", help="10 kills")
    arguments.add_argument("--clients", type=int, default=3)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    preload()
    with tempfile.TemporaryDirectory(prefix="evsys-kills-") as place:
        summary = kill_and_check(Path(place), 10 if options.small else options.kills, options.clients, options.seed)
    print(json.dumps(summary, indent=1))
    return 1 if summary["wrong"] else 0


def kill_and_check(place: Path, kills: int, clients: int, seed: int) -> dict[str, Any]:
    """All of it; what is wrong is in ``wrong``."""
    from tiny import save_byte_model

    model, started = save_byte_model(place / "model"), time.monotonic()
    server = Server(place, model, "--retain-operations")
    journals = [place / f"client-{number}.jsonl" for number in range(clients)]
    dice = random.Random(seed)
    running: dict[Path, subprocess.Popen[bytes]] = {}
    killed, rounds = 0, 0
    server.start()
    while killed < kills:
        for journal in journals:  # a client that has sent all it had to goes on with more
            if journal not in running or running[journal].poll() == 0:
                rounds += 1
                running[journal] = _client(server, journal, operations=40 * rounds, seed=seed + rounds)
            elif running[journal].poll() is not None:
                raise SystemExit(f"a client ended with {running[journal].poll()}; {tail(journal.with_suffix('.log'))}")
        _wait_for_work(journals)
        time.sleep(dice.uniform(0.0, 3.0))
        server.kill()
        killed += 1
        time.sleep(dice.uniform(0.0, 1.0))
        server.start()
    codes = {process.wait(LIMIT_S * 2) for process in running.values()}
    server.stop()
    found = _check(place, model, journals)
    found["wrong"] += [] if found["acknowledged"] else ["the clients did nothing"]
    found["wrong"] += [f"a client ended with {code}" for code in codes - {0}]
    return {"kills": killed, "seconds": round(time.monotonic() - started), **found}


def _wait_for_work(journals: list[Path]) -> None:
    """Return once a client has noted something, or has nothing left to do."""
    before, deadline = _sizes(journals), time.monotonic() + LIMIT_S
    while _sizes(journals) == before:
        if time.monotonic() > deadline:
            raise SystemExit(f"no client does anything: {tail(journals[0].with_suffix('.log'))}")
        if all(path.exists() and '"end"' in path.read_text()[-20:] for path in journals):
            return
        time.sleep(0.02)


def _sizes(journals: list[Path]) -> list[int]:
    return [path.stat().st_size if path.exists() else 0 for path in journals]


def _client(server: Server, journal: Path, *, operations: int, seed: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "load_client.py"), server.url, server.key]
    command += [str(journal.parent / "model"), str(journal), str(operations), str(seed)]
    with journal.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _check(place: Path, model: Path, journals: list[Path]) -> dict[str, Any]:
    from load_check import check_journals, replay

    from nat_plugin_evsys.service.store.store import Store

    store = Store(place / "store")
    try:
        counts, wrong = check_journals(store, journals)
        replays = [replay(store, place / "store", model, row, place / "replayed") for row in store.models()]
    finally:
        store.close()
    # A model whose client had ended before the last kill comes back at its next request, of which there was none. Its
    # whole log has run again above, with the same results.
    unasked = [each for each in replays if each and each.endswith("the server left no state")]
    wrong += [each for each in replays if each and each not in unasked]
    equal = sum(each is None for each in replays)
    return {**counts, "replayed_equal": equal, "not_asked_for_again": len(unasked), "wrong": wrong[:20]}


if __name__ == "__main__":
    sys.exit(main())
