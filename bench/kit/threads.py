"""How often threads have waited: each time they did, something woke them again."""

from __future__ import annotations

from pathlib import Path


def thread_switches(pid: int) -> dict[int, int]:
    """Voluntary context switches of each thread of a process (proc_pid_status(5))."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            lines = (task / "status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            continue
        for line in lines:
            if line.startswith("voluntary_ctxt_switches:"):
                found[int(task.name)] = int(line.split()[1])
    return found


def wake_ups(before: dict[int, int], after: dict[int, int], known: set[int]) -> int:
    """How often threads woke between two looks, those aside that are ``known``."""
    return sum(after[tid] - before[tid] for tid in set(before) & set(after) - known)
