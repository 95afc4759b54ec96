"""Directories that are either whole or not there, whenever the process dies."""

from __future__ import annotations

import ctypes
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LEFTOVER_AGE_S = 3600.0


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling to write into; on leaving the block it is fsynced and takes ``target``'s place.

    An existing ``target`` is swapped out in one step where the kernel can (Linux renameat2), so that at every moment
    one whole directory bears the name. When the block raises, the temporary is removed and ``target`` stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:12]}"
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        if target.exists():
            _swap(temporary, target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """``target`` becomes the new directory and ``new`` holds the old one."""
    if _exchange(new, target):
        return
    # Without renameat2 the name is unused for a moment; the old directory lies beside it under a name that says so.
    aside = target.parent / f".{target.name}.old-{uuid.uuid4().hex[:12]}"
    target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def replace_file(target: Path, text: str) -> None:
    """Write a file that is either the old one or, whole, the new one, whenever the process dies."""
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        temporary.write_text(text)
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_directory(target: Path) -> None:
    """Delete a directory: its name is free at once, whenever the process dies."""
    dying = target.parent / f".{target.name}.tmp-{uuid.uuid4().hex[:12]}"
    target.rename(dying)
    shutil.rmtree(dying, ignore_errors=True)


def restore_set_aside(target: Path) -> None:
    """Bring back a directory that ``_swap`` had set aside when the process died between its two renames."""
    if target.exists():
        return
    for aside in sorted(target.parent.glob(f".{target.name}.old-*")):
        aside.rename(target)
        return


def _remove_leftovers(target: Path) -> None:
    """Delete temporaries of this name that a killed process left behind an hour ago or earlier."""
    for path in target.parent.glob(f".{target.name}.tmp-*"):
        if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
            shutil.rmtree(path, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
