"""The limits programs run under.

The agent takes them itself and programs inherit them: there is no moment between fork and
exec at which a process with threads may safely run code, and none after it at which the
program does not run yet. So they must leave the agent room too.
"""

from __future__ import annotations

import resource
from typing import NamedTuple

OPEN_FILES = 1024
FILE_BYTES = 100 * 1024 * 1024
PROCESSES = 512

LEAST_OPEN_FILES = 1024
"""What the agent itself needs: five descriptors for each of 128 programs, 64 forwarded
streams and 16 connections, with some to spare."""

MOST_OPEN_FILES = 1024 * 1024
"""The kernel's own ceiling (fs.nr_open)."""


class Limits(NamedTuple):
    """Open files and processes of a program (processes of its user), and the largest file it
    may write in bytes. The defaults are the protocol's ("Exec")."""

    open_files: int = OPEN_FILES
    processes: int = PROCESSES
    file_bytes: int = FILE_BYTES


def apply_limits(limits: Limits, *, dropped_user: bool) -> list[str]:
    """Take the limits programs run under, soft and hard; what could not be had, and why.

    The limit on processes counts by user over the whole system, so it is set only where
    programs have a user of their own.
    """
    faults: list[str] = []
    open_files = min(max(limits.open_files, LEAST_OPEN_FILES), MOST_OPEN_FILES)
    if open_files != limits.open_files:
        faults.append(f"limit of {limits.open_files} open files: {open_files} is in force")
    wanted = [(resource.RLIMIT_NOFILE, open_files), (resource.RLIMIT_FSIZE, limits.file_bytes)]
    if dropped_user:
        wanted.append((resource.RLIMIT_NPROC, limits.processes))
    for kind, value in wanted:
        hard = resource.getrlimit(kind)[1]
        if dropped_user:
            resource.setrlimit(kind, (value, value))
        else:
            soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (soft, hard))
    return faults
