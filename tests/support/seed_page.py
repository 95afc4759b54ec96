"""Runs the code of a page of documentation block by block, as a reader would who goes down the page."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import re
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parents[1] / "clients" / "pages"


def page_blocks(name: str) -> dict[str, tuple[int, str]]:
    """(line of the document, code) of each block of ``pages/<name>.txt`` by its title."""
    parts = re.split(r"^# --- (\d+) (.*)\n", (PAGES / f"{name}.txt").read_text(), flags=re.M)[1:]
    return {title: (int(line), code) for line, title, code in zip(*(parts[at::3] for at in range(3)), strict=True)}


class SeedPage:
    """The blocks of a page and the names that they share.

    Args:
        name: of the file, which holds the document's own lines; only imports and names of models are others.
        given: what the page leaves to its reader.

    Attributes:
        names: what the blocks have defined so far.
        left: titles of the blocks that have not run.
    """

    def __init__(self, name: str, **given: Any) -> None:
        self._blocks = {title: code for title, (_, code) in page_blocks(name).items()}
        self.names: dict[str, Any] = {"__name__": "__main__", **given}
        self.left = list(self._blocks)

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def read(self, title: str) -> str:
        """A block that shows something and is no program."""
        if title in self.left:
            self.left.remove(title)
        return self._blocks[title]

    def run(self, title: str, **replaced: str) -> str:
        """Run a block; gives what it printed.

        Args:
            replaced: ``written=used``: a string of the page for another, such as a path.
        """
        code = self.read(title)
        for written, used in replaced.items():
            assert code.count(f'"{written}"') == 1
            code = code.replace(f'"{written}"', repr(used))
        program = compile(code, title, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            done = eval(program, self.names)
            if inspect.iscoroutine(done):
                asyncio.run(_wait(done))
        return shown.getvalue()


async def _wait(block: Any) -> None:
    await block


def numbers(pattern: str, text: str) -> list[float]:
    """What the pattern's group finds, as numbers."""
    return [float(found) for found in re.findall(pattern, text)]
