"""Consoles of ended machines: in the run's directory first, then among the last ones."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

KEPT = 200
"""Consoles of ended runs that are kept, 64 KiB each at most."""

_FILE = "console.log"
# What a machine's console holds, and what is kept of all of one run's (bytes).
_LIMIT = 64 * 1024


def keep_console(directory: Path, console: bytes, stage: str | None = None) -> None:
    """Write a machine's console to its run's directory, behind those of the run's machines that
    ended before; `stage` is whose it was. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(directory / _FILE, flags, 0o600), "r+b") as file:
        before = file.read(_LIMIT)
        if before:
            console = before + f"\n== {stage or 'another machine'} ==\n".encode() + console
        file.seek(0)
        file.write(console[-_LIMIT:])
        file.truncate()


def put_by(directory: Path) -> None:
    """Take the console out of the directory of a run that has ended, and forget the oldest."""
    folder = _folder(directory.parent)
    with contextlib.suppress(OSError):  # a run without a console, or a full disk
        folder.mkdir(mode=0o700, exist_ok=True)
        (directory / _FILE).replace(folder / f"{directory.name}.log")
        newest_first = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime_ns)
        for path in newest_first[KEPT:]:
            path.unlink(missing_ok=True)


def read_console(runs_dir: Path, run_id: str) -> bytes:
    """The console of a run that has ended. Raises OSError."""
    try:
        return (runs_dir / run_id / _FILE).read_bytes()
    except FileNotFoundError:
        return (_folder(runs_dir) / f"{run_id}.log").read_bytes()


def forget_consoles(runs_dir: Path, runs: Iterable[str]) -> None:
    """Remove what was kept of the consoles of these runs."""
    for run_id in runs:
        with contextlib.suppress(OSError):
            (_folder(runs_dir) / f"{run_id}.log").unlink(missing_ok=True)


def _folder(runs_dir: Path) -> Path:
    return runs_dir.parent / "consoles"
