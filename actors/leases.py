"""Leases: what a run process holds on the host, written down so that others can clean up.

A line of JSON for each process and path, in the run's directory, before or as soon as it exists.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from voidbus.actors.runtime.process import ProcessIdentity, kill_leftover


@dataclass(frozen=True)
class Leftovers:
    """What cleaning up found."""

    processes_killed: int
    paths_removed: int


class LeaseFile:
    """The run process's side: append, never rewrite. Any thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def process(self, identity: ProcessIdentity) -> None:
        self._write({"pid": identity.pid, "start_time": identity.start_time})

    def path(self, path: Path) -> None:
        self._write({"path": str(path)})

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, lease: dict[str, object]) -> None:
        os.write(self._fd, json.dumps(lease).encode() + b"\n")


def reap(lease_file: Path, inside: Path) -> Leftovers:
    """Kill the processes and remove the paths of a run whose process is gone.

    Only paths below `inside`, the run's own directory, are removed, whatever the file says; a
    process is killed only if it is still the one that was written down.
    """
    killed = removed = 0
    try:
        lines = lease_file.read_bytes()[: 4 * 1024 * 1024].splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            lease = json.loads(line)
            if "pid" in lease:
                killed += kill_leftover(
                    ProcessIdentity(int(lease["pid"]), int(lease["start_time"]))
                )
            elif _remove(Path(str(lease["path"])), inside):
                removed += 1
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # a line cut short by the kill
    return Leftovers(killed, removed)


def _remove(path: Path, inside: Path) -> bool:
    if inside not in path.parents or ".." in path.parts or not path.exists():
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return True
