"""Consoles of ended machines: in the run's directory first, then among the last ones."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

KEPT = 200
"""Consoles of ended runs that are kept, 64 KiB each at most."""

_FILE = "console.log"


def keep_console(directory: Path, console: bytes) -> None:
    """Write a machine's console to its run's directory. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with os.fdopen(os.open(directory / _FILE, flags, 0o600), "wb") as file:
        file.write(console)


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


def _folder(runs_dir: Path) -> Path:
    return runs_dir.parent / "consoles"
