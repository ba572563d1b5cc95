from __future__ import annotations

import os
from pathlib import Path

import pytest

from voidbus.actors.console_file import KEPT, keep_console, put_by, read_console
from voidbus.actors.recovery import remove_directory


def test_a_console_outlives_the_directory_of_its_run(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "r1"
    directory.mkdir(parents=True)
    keep_console(directory, b"booted")
    assert read_console(tmp_path / "runs", "r1") == b"booted"
    remove_directory(directory)
    assert not directory.exists()
    assert read_console(tmp_path / "runs", "r1") == b"booted"
    (kept,) = (tmp_path / "consoles").iterdir()
    assert kept.stat().st_mode & 0o077 == 0


def test_a_run_without_a_console_is_removed_all_the_same(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "r1"
    directory.mkdir(parents=True)
    remove_directory(directory)
    assert not directory.exists()
    with pytest.raises(OSError, match=r"r1\.log"):
        read_console(tmp_path / "runs", "r1")


def test_only_the_last_consoles_are_kept(tmp_path: Path) -> None:
    for number in range(KEPT + 3):
        directory = tmp_path / "runs" / f"r{number}"
        directory.mkdir(parents=True)
        keep_console(directory, b"x")
        os.utime(directory / "console.log", (number, number))
        put_by(directory)
    names = {path.stem for path in (tmp_path / "consoles").iterdir()}
    assert names == {f"r{number}" for number in range(3, KEPT + 3)}
