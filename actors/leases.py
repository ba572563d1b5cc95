"""Leases: what a run process holds on the host, written down so that others can clean up.

A line of JSON for each process and path, in the run's directory, before or as soon as it exists.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from voidbus.actors.runtime.process import ProcessIdentity, kill_leftover

log = logging.getLogger("voidbus.actors")

# A run holds a handful of things; a file far larger is not ours (bytes).
_FILE_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True)
class Leftovers:
    """What cleaning up found."""

    processes_killed: int
    paths_removed: int


class LeaseFile:
    """The run process's side: append, never rewrite. Any thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._closed = False

    def process(self, identity: ProcessIdentity) -> None:
        self._write({"pid": identity.pid, "start_time": identity.start_time})

    def path(self, path: Path) -> None:
        self._write({"path": str(path)})

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)

    def _write(self, lease: dict[str, object]) -> None:
        with self._lock:
            if self._closed:  # its number may be another file's by now
                raise ValueError("the lease file is closed")
            os.write(self._fd, json.dumps(lease).encode() + b"\n")


def reap(lease_file: Path, inside: Path) -> Leftovers:
    """Kill the processes and remove the paths of a run whose process is gone.

    Only paths below `inside`, the run's own directory, are removed, whatever the file says; a
    process is killed only if it is still the one that was written down. What can't be removed is
    left: it must not keep its run from ending.
    """
    killed = removed = 0
    try:
        with lease_file.open("rb") as file:
            lines = file.read(_FILE_LIMIT).splitlines()
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
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            continue  # a line cut short by the kill
        except OSError as error:
            log.error("cannot clean up %s: %s", line.decode(errors="replace")[:200], error)
    return Leftovers(killed, removed)


def _remove(path: Path, inside: Path) -> bool:
    # The folder it is in must really be below, not only by name: no symlink leads out of it.
    folder = path.parent.resolve()
    below = inside in path.parents and folder.is_relative_to(inside.resolve())
    if not below or ".." in path.parts or not os.path.lexists(path):
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return True
