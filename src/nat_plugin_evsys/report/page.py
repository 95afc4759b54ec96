"""``report.html``: one file that shows one run, or two side by side, in any browser, from disk, without a network.

Model output never becomes part of the page's code: it is in JSON and in compressed blocks, which the page's
scripts show as text. A content security policy names those scripts by their hashes and forbids everything
else, every connection included.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from nat_plugin_evsys.files import atomic_write
from nat_plugin_evsys.json_lines import to_json
from nat_plugin_evsys.report.blocks import Block, Blocks
from nat_plugin_evsys.report.drop_reasons import drop_reason_meanings
from nat_plugin_evsys.report.overview import collection_entry, overview
from nat_plugin_evsys.report.verdict import RowRewards, comparison, delivered
from nat_plugin_evsys.runs import RunDirectory
from nat_plugin_evsys.runs.rollouts import Collection, CollectionKind, RolloutFiles

DEFAULT_MEGABYTES = 8.0
"""Room for the blocks. With it the page stays under 10 MB."""

LIBRARIES = ("vendor/uPlot.iife.min.js", "vendor/htm-preact.umd.js")
APP = ("format", "data", "charts", "verdict", "changes", "tokens", "rollouts", "health", "setup", "main")
"""The page's own scripts, in the order in which they build on one another."""

_PAGE = "nat_plugin_evsys.report.page_files"


class Report:
    """The report of one run or of two. Writing it again reads only what is new.

    Args:
        megabytes: size limit of the rollouts; the page says which were left out.
    """

    def __init__(self, runs: Sequence[Path], *, megabytes: float = DEFAULT_MEGABYTES) -> None:
        self._runs = list(runs)
        self._blocks = [Blocks(RolloutFiles(path)) for path in runs]  # needs no state, which may be torn
        self._room = int(megabytes * 1_000_000)

    def write(self, target: Path) -> int:
        """Write the page.

        Returns:
            Its bytes.

        Raises:
            CheckpointError, DataError: a run cannot be read.
            OSError: ``target`` cannot be written.
        """
        html = self.html().encode()
        atomic_write(target, html)
        return len(html)

    def html(self) -> str:
        """The page."""
        found = [blocks.collections() for blocks in self._blocks]
        embedded = self._embedded(found)
        runs, elements = [], []
        for number, (path, blocks) in enumerate(zip(self._runs, self._blocks, strict=True)):
            entries = []
            for collection in found[number]:
                block, element = embedded[number].get(collection), f"block-{number}-{collection}"
                entries.append(collection_entry(collection, block, element))
                if block is not None:
                    elements.append({"id": element, "data": block.data})
            facts = overview(RunDirectory.open(path), found[number], blocks.rewards)
            runs.append({**facts, "collections": entries})
        data = {
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "version": version("nat_plugin_evsys"),
            "drop_reasons": drop_reason_meanings(),
            "comparison": self._comparison(found, runs) if len(found) == 2 else None,
            "runs": runs,
        }
        return _render(title=" and ".join(run["name"] for run in runs), data=data, blocks=elements)

    def _comparison(self, found: Sequence[Sequence[Collection]], runs: Sequence[Mapping[str, Any]]) -> str:
        """Which of two runs came out better."""
        kinds, rewards = zip(*map(_last_measured, self._blocks, found, runs), strict=True)
        return comparison(kinds, rewards)

    def _embedded(self, found: Sequence[Sequence[Collection]]) -> list[dict[Collection, Block]]:
        """The blocks of each run that fit, the most interesting of each run first. No others are made, or nearly none:
        the size of a block is known for certain only once it was made.
        """
        ranked = sorted(
            (rank, number, each) for number, all in enumerate(found) for rank, each in enumerate(_by_worth(all))
        )
        chosen: list[dict[Collection, Block]] = [{} for _ in found]
        room = self._room
        for _, number, collection in ranked:
            blocks = self._blocks[number]
            if blocks.size(collection) <= room and len((block := blocks.block(collection)).data) <= room:
                room -= len(block.data)
                chosen[number][collection] = block
        for blocks, own in zip(self._blocks, chosen, strict=True):
            blocks.hold(own)
        return chosen


def _last_measured(
    blocks: Blocks, collections: Sequence[Collection], run: Mapping[str, Any]
) -> tuple[CollectionKind, RowRewards]:
    """The last measurement of what a run came to, and what each row earned."""
    kept = delivered(collections, run["reloads"])
    heldout = [each for each in kept if each.kind == "heldout"]
    measured = heldout or [each for each in kept if each.kind == "train"]
    return ("heldout" if heldout else "train", blocks.rewards(measured[-1]) if measured else {})


def _by_worth(collections: Sequence[Collection]) -> list[Collection]:
    """First and last measurement, last and first epoch, then the others, newest first."""
    kinds: dict[str, list[Collection]] = {"heldout": [], "epoch": [], "base": [], "train": []}
    for each in collections:
        kinds[each.kind].append(each)
    ends = [kind[end] for kind in kinds.values() if kind for end in (-1, 0)]
    rest = sorted(collections, key=lambda each: each.epoch, reverse=True)
    return list(dict.fromkeys([*ends, *rest]))


def _render(*, title: str, data: dict[str, Any], blocks: list[dict[str, str]]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    package, _, folder = _PAGE.rpartition(".")
    environment = Environment(
        loader=PackageLoader(package, folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    scripts = _scripts()
    return environment.get_template("page.html.j2").render(
        title=title,
        policy=_content_policy(scripts),
        styles=[_file("vendor/uPlot.min.css"), _file("style.css")],
        scripts=scripts,
        data=_inert(to_json(data)),
        blocks=blocks,
    )


@cache
def _file(name: str) -> str:
    return files(_PAGE).joinpath(name).read_text(encoding="utf-8")


@cache
def _scripts() -> tuple[str, ...]:
    """The libraries as they are, then the page's own scripts as one."""
    app = "\n".join(_file(f"app/{name}.js") for name in APP)
    return (*(_file(name) for name in LIBRARIES), f'(() => {{\n"use strict";\n{app}\n}})();\n')


def _content_policy(scripts: Sequence[str]) -> str:
    hashes = " ".join(f"'sha256-{digest}'" for digest in _digests(scripts))
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"


def _digests(scripts: Sequence[str]) -> Iterator[str]:
    for script in scripts:
        yield base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _inert(text: str) -> str:
    """JSON whose strings cannot close the HTML element that contains it."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
