"""Processes known for certain: a pid with its start time, held by a pidfd.

A pid alone names nobody for long: it is recycled. A pid with its start time names one process for
the life of the machine, and a pidfd stays bound to one process for the life of the descriptor
(pidfd_open(2)). Here the pidfd is always opened before the start time is compared, so what was
compared is what is held.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_PROC = Path("/proc")
# Besides ESRCH: an impossible number, or one that now names a thread (pidfd_open(2), EINVAL;
# ENOENT since Linux 6.9).
_NO_SUCH_PROCESS = frozenset({errno.ESRCH, errno.EINVAL, errno.ENOENT})
_DEAD_STATES = frozenset("ZXx")  # zombie, dead: proc_pid_stat(5)


class ProcessGoneError(Exception):
    """The process has ended, or its pid now belongs to another one."""


@dataclass(frozen=True, slots=True, order=True)
class ProcessIdentity:
    """One process for certain. `start_time` is in clock ticks since boot (/proc/PID/stat, 22)."""

    pid: int
    start_time: int

    def __str__(self) -> str:
        return f"process {self.pid} (started at tick {self.start_time})"


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What is used here of /proc/PID/stat (proc_pid_stat(5))."""

    pid: int
    name: str
    state: str
    parent: int
    session: int
    start_time: int

    @property
    def identity(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.start_time)

    @property
    def dead(self) -> bool:
        return self.state in _DEAD_STATES


def parse_stat(text: bytes) -> ProcessStat:
    """Parse a /proc/PID/stat line. Raises ValueError if it isn't one.

    The name is the process's own choice and may hold spaces, parentheses and line ends, so it
    reaches from the first parenthesis to the last one.
    """
    opening, closing = text.find(b"("), text.rfind(b")")
    if opening < 0 or closing < opening:
        raise ValueError("not a /proc/PID/stat line: it names no process in parentheses")
    fields = text[closing + 1 :].split()
    if len(fields) < 20:
        raise ValueError(f"not a /proc/PID/stat line: {len(fields)} fields after the name")
    return ProcessStat(
        pid=int(text[:opening]),
        name=text[opening + 1 : closing].decode(errors="replace"),
        state=fields[0].decode("ascii"),
        parent=int(fields[1]),  # field 4
        session=int(fields[3]),  # field 6
        start_time=int(fields[19]),  # field 22
    )


def stat_of(pid: int) -> ProcessStat:
    """The state of a process, a zombie's too. Raises ProcessGoneError if there is none."""
    try:
        return parse_stat((_PROC / str(pid) / "stat").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessGoneError(f"there is no process {pid}") from None


def identity_of(pid: int) -> ProcessIdentity:
    """Who has this pid now. Raises ProcessGoneError if nobody alive has; a zombie is gone."""
    stat = stat_of(pid)
    if stat.dead:
        raise ProcessGoneError(f"process {pid} has ended")
    return stat.identity


def current_identity() -> ProcessIdentity:
    """This process."""
    return identity_of(os.getpid())


class ProcessHandle:
    """One process, held by a pidfd. Close it, or use it as a context manager."""

    def __init__(self, identity: ProcessIdentity, pidfd: int) -> None:
        """Take over `pidfd`, known to be of `identity`; `adopt` opens one and makes sure."""
        self.identity = identity
        self._fd = pidfd

    @classmethod
    def adopt(cls, identity: ProcessIdentity) -> Self:
        """Hold a process that something else started.

        Raises ProcessGoneError if it has ended or its pid was recycled; OSError if no descriptor
        is to be had.
        """
        try:
            fd = os.pidfd_open(identity.pid)
        except OSError as error:
            if error.errno not in _NO_SUCH_PROCESS:
                raise
            raise ProcessGoneError(f"{identity} has ended") from None
        handle = cls(identity, fd)
        try:
            found = identity_of(identity.pid)
            if found != identity:
                raise ProcessGoneError(f"{identity} has ended; its pid is now {found}")
        except BaseException:
            handle.close()
            raise
        return handle

    def signal(self, sig: signal.Signals) -> None:
        """Send a signal. Raises ProcessGoneError if it has ended and was reaped."""
        try:
            signal.pidfd_send_signal(self.fileno(), sig)
        except ProcessLookupError:
            raise ProcessGoneError(f"{self.identity} has ended") from None

    def alive(self) -> bool:
        """Whether it runs; a zombie doesn't."""
        return not self.wait(0)

    def wait(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for its end; whether it has ended. Reaps nothing."""
        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        return bool(poller.poll(max(timeout, 0) * 1000))

    def fileno(self) -> int:
        """The pidfd. Raises ValueError once closed."""
        if self._fd < 0:
            raise ValueError(f"the handle of {self.identity} is closed")
        return self._fd

    def close(self) -> None:
        """Let go of it; the process is left as it is. Repeating it does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ProcessHandle {self.identity}{' closed' if self._fd < 0 else ''}>"


def kill_leftover(identity: ProcessIdentity) -> bool:
    """SIGKILL it if it is still that process; whether it was. Doesn't wait for its end."""
    with (
        contextlib.suppress(ProcessGoneError),
        ProcessHandle.adopt(identity) as handle,
    ):
        handle.signal(signal.SIGKILL)
        return True
    return False


def descendants(pid: int) -> list[ProcessIdentity]:
    """Everything alive below a process, parents before their children, without itself.

    These are its children's children and so on, and the members of its session: a process whose
    parent died belongs to init, but it keeps its session. It is one look at /proc, so what forks
    meanwhile may be missing: stop or kill the parents first and look again until it is empty. The
    session's part also holds after `pid` itself has ended, as the kernel doesn't recycle a pid
    while it names a session.
    """
    stats = [stat for stat in _all_stats() if not stat.dead]
    children: dict[int, list[ProcessStat]] = {}
    for stat in stats:
        children.setdefault(stat.parent, []).append(stat)
    found: dict[int, ProcessStat] = {}
    queue = [*children.get(pid, ()), *(stat for stat in stats if stat.session == pid)]
    for stat in queue:  # it grows while it is walked: breadth first
        if stat.pid != pid and stat.pid not in found:
            found[stat.pid] = stat
            queue.extend(children.get(stat.pid, ()))
    return [stat.identity for stat in found.values()]


def _all_stats() -> Iterator[ProcessStat]:
    for entry in os.listdir(_PROC):  # noqa: PTH208 - a Path for each of thousands is waste
        if entry.isdecimal():
            with contextlib.suppress(ProcessGoneError):
                yield stat_of(int(entry))
