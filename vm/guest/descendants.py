"""The processes below this one: starting, reaping and ending all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from typing import Any


def stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state (field 3) on. Raises OSError when gone."""
    fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096).rpartition(b")")[2].split()
    finally:
        os.close(fd)


def process_ids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 - speed


def descendants(root: int) -> dict[int, str]:
    """Every process below ``root`` and its one-letter state."""
    below: dict[int, list[int]] = {}
    states: dict[int, str] = {}
    for pid in process_ids():
        try:
            fields = stat_fields(pid)
            below.setdefault(int(fields[1]), []).append(pid)
            states[pid] = fields[0].decode()
        except (OSError, IndexError, ValueError):
            continue
    found: dict[int, str] = {}
    waiting = [root]
    while waiting:
        for child in below.get(waiting.pop(), ()):
            if child not in found:
                found[child] = states[child]
                waiting.append(child)
    return found


def children(parent: int) -> set[int]:
    """The processes ``parent`` has to wait for, dead ones among them."""
    try:
        found: set[int] = set()
        for thread in os.listdir(f"/proc/{parent}/task"):  # noqa: PTH208 - speed
            found.update(_children_of_thread(f"/proc/{parent}/task/{thread}/children"))
        return found
    except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
        return {pid for pid in process_ids() if _parent(pid) == parent}


def _children_of_thread(path: str) -> list[int]:
    parts: list[bytes] = []
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        if os.path.exists("/proc/thread-self/children"):  # noqa: PTH110
            raise
        return []
    try:
        while part := os.read(fd, 65536):
            parts.append(part)
    finally:
        os.close(fd)
    return [int(text) for text in b"".join(parts).split()]


def _parent(pid: int) -> int | None:
    try:
        return int(stat_fields(pid)[1])
    except (OSError, IndexError, ValueError):
        return None


def send_signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except (ProcessLookupError, PermissionError):
            continue


def kill_descendants(root: int, timeout: float, spare: Iterable[int] = ()) -> bool:
    """SIGKILL everything below ``root`` until nothing runs there.

    Repeats, because a process may fork between being seen and being killed. Returns False
    when something still runs after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    spared = set(spare)
    pause = threading.Event()
    while True:
        alive = [
            pid
            for pid, state in descendants(root).items()
            if state not in "ZX" and pid not in spared
        ]
        if not alive:
            return True
        if time.monotonic() >= deadline:
            return False
        send_signal(alive, signal.SIGKILL)
        pause.wait(0.002)


class Children:
    """Starts children, and reaps the orphans that were adopted without reaping those."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: set[int] = set()

    def start(self, argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        """Popen, in a session of its own. Raises what Popen raises."""
        # Held while forking, so that the orphan reaper can't take a child we don't know yet.
        with self._lock:
            child = subprocess.Popen(argv, start_new_session=True, close_fds=True, **options)
            self._started.add(child.pid)
            return child

    def finish(self, child: subprocess.Popen[bytes]) -> int:
        """Reap a child of ours that has exited; its return code as Popen gives it."""
        with self._lock:
            code = child.wait()
            self._started.discard(child.pid)
            return code

    def reap_orphans(self) -> None:
        """Reap every dead child that was not started here."""
        with self._lock:
            for pid in children(os.getpid()) - self._started:
                try:
                    os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:
                    continue
