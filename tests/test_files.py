"""A file is whole or absent, with the permissions that the user's umask gives."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nat_plugin_evsys.errors import ConfigError
from nat_plugin_evsys.files import atomic_write, hold_file


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    atomic_write(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nat_plugin_evsys.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("state.json", "old")]
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "nowhere" / "x", "new")


def test_a_directory_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr("nat_plugin_evsys.files.os.fsync", files_only)
    atomic_write(tmp_path / "x", "whole")
    assert (tmp_path / "x").read_text() == "whole"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_used_without_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def no_locks(file: object, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_locks)
    hold_file(tmp_path / ".lock", "in use").close()
    assert f"{tmp_path / '.lock'} cannot be locked ({os.strerror(code)})" in caplog.text


def test_a_held_file_is_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with hold_file(tmp_path / ".lock", "in use"), pytest.raises(ConfigError, match="in use"):
        hold_file(tmp_path / ".lock", "in use")
    hold_file(tmp_path / ".lock", "in use").close()
    assert caplog.text == ""


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
