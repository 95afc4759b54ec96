"""Files and directories that are either whole or absent, whenever the process dies."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nat_plugin_evsys.errors import ConfigError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_LEFTOVER_AGE_S = 3600.0
_TEMPORARY = re.compile(r"\..+\.(tmp|old)-[0-9a-f]{12}")
_NO_SYNC_HERE = {errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP}
"""What systems and network disks say that cannot sync a directory."""
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}
"""What they say of a lock that another process has, and not of locks that they do not know."""

logger = logging.getLogger(__name__)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Replace ``path`` by ``data``: a reader, or a crash at any moment, sees the old file or the new one.

    Who may read the old one may read the new one, and nobody else.

    Raises:
        OSError: the directory is missing or not writable; no temporary file is left behind.
    """
    temporary = _beside(path, "tmp")
    try:
        with naming(path):
            temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            if path.exists():
                shutil.copymode(path, temporary)
            _sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block says which file it was about; the system does not, if a write fails."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_directory(target: Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary sibling to write into; on leaving the block it is fsynced and takes ``target``'s place.

    An existing ``target`` is swapped out in one step where the kernel can (Linux renameat2), so that at every moment
    one whole directory bears the name. When the block raises, the temporary is removed and ``target`` stays.

    Args:
        private: nobody but its owner may read it and the files in it, whatever the umask.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = _beside(target, "tmp")
    temporary.mkdir(mode=0o700 if private else 0o777)
    try:
        with naming(target):
            yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            if private:
                path.chmod(0o700 if path.is_dir() else 0o600)
            _sync(path)
        if target.exists():
            _swap(temporary, target)
        else:
            temporary.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def no_file(setting: str, path: Path | str) -> str:
    """The message where a setting names a file that is not there."""
    where = "" if Path(path).is_absolute() else f" (`{path}` is relative to the directory that nat runs in)"
    return f"{setting}: no file at {Path(path).absolute()}{where}; check the path"


def hold_file(path: Path, in_use: str) -> IO[str]:
    """Keep ``path``, which is made, from other processes until it is closed or this one ends.

    A system without flock runs without this guard, and so does a disk without it, with a warning.

    Raises:
        ConfigError: another process holds it; ``in_use`` is the message.
    """
    handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held until close
    try:
        import fcntl
    except ImportError:
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            handle.close()
            raise ConfigError(in_use) from error
        logger.warning("%s cannot be locked (%s): make sure that no other process uses it", path, error.strerror)
    return handle


def others_may_read(path: Path) -> bool:
    """Whether other users of the machine may read a file, or enter a directory."""
    return path.stat().st_mode & 0o077 != 0


def remove_directory(target: Path) -> None:
    """Delete a directory: its name is free at once, whenever the process dies."""
    dying = _beside(target, "tmp")
    target.rename(dying)
    shutil.rmtree(dying, ignore_errors=True)


def remove_temporaries(directory: Path) -> None:
    """Delete what killed writers left in a directory tree that nobody writes to now."""
    for path in [path for path in directory.rglob(".*") if _TEMPORARY.fullmatch(path.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def restore_set_aside(target: Path) -> None:
    """Bring back a directory that ``_swap`` had set aside when the process died between its two renames."""
    if target.exists():
        return
    for aside in sorted(target.parent.glob(f".{target.name}.old-*")):
        aside.rename(target)
        return


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{uuid.uuid4().hex[:12]}")


def _swap(new: Path, target: Path) -> None:
    """``target`` becomes the new directory and ``new`` holds the old one."""
    if _exchange(new, target):
        return
    # Without renameat2 the name is unused for a moment; the old directory lies beside it under a name that says so.
    aside = _beside(target, "old")
    target.rename(aside)
    new.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    failed: int = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return failed == 0


def _remove_leftovers(target: Path) -> None:
    """Delete temporaries of this name that a killed process left behind an hour ago or earlier."""
    for path in target.parent.glob(f".{target.name}.tmp-*"):
        if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Make a file's bytes durable, or the names in a directory, where the system can sync one."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with naming(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC_HERE or not path.is_dir():
            raise
