"""A program beside a machine that serves it by one socket, and ends when that is closed.

So it does not outlive the process that started it, whatever ends that. One that does not end so
is killed, and with it what it has started.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence

from voidbus.vm.guest.descendants import children, stat_fields
from voidbus.vm.machine import Lease
from voidbus.vm.signal_name import signal_name

SAID_BYTES = 4096
"""How much of what it says is kept."""

END_SECONDS = 2.0
"""How long it may take to end once its socket is closed, before it is killed; and then to be gone,
which takes longer where it waits for a disk."""

_LINES = 5


class HelperProcess:
    """The running program. Not for several threads."""

    def __init__(
        self, command: Sequence[str], descriptors: Sequence[int], *, noise: tuple[str, ...] = ()
    ) -> None:
        """Start it with these descriptors, without our environment. Lines it says that begin with
        ``noise`` are let be. Raises OSError."""
        self._noise = noise
        self._said = bytearray()
        with contextlib.ExitStack() as undo:
            self.stderr, stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
            undo.callback(os.close, self.stderr)
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    pass_fds=descriptors,
                    cwd="/",
                    env={"PATH": os.defpath},
                    start_new_session=True,
                )
            finally:
                os.close(stderr)
            undo.callback(self._process.wait, END_SECONDS)
            undo.callback(self._process.kill)
            self.pidfd = os.pidfd_open(self._process.pid)
            """Readable when it has ended."""
            undo.callback(os.close, self.pidfd)
            # Its start time is read before anyone can reap it.
            self.lease = _lease(self.pid)
            undo.pop_all()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def children(self) -> list[Lease]:
        """What it has started and not waited for."""
        found = []
        for pid in children(self.pid):
            with contextlib.suppress(OSError):  # it has ended since
                found.append(_lease(pid))
        return found

    def read_stderr(self) -> bool:
        """Keep what it says, when ``stderr`` is readable. False at its end."""
        try:
            data = os.read(self.stderr, SAID_BYTES)
        except BlockingIOError:
            return True
        self._said += data
        del self._said[:-SAID_BYTES]
        return bool(data)

    def said(self) -> str:
        """The last of what it has said, on one line."""
        lines = (
            "".join(c for c in line if c.isprintable())
            for line in self._said.decode(errors="replace").splitlines()
        )
        kept = [line for line in lines if line and not line.startswith(self._noise)]
        return " | ".join(kept[-_LINES:]) or "it said nothing"

    def close(self, grace: float = END_SECONDS) -> str:
        """Wait until it has ended, its socket closed, and after ``grace`` seconds kill it; and kill
        what is left of what it has started. Tells how it ended. Again is fine."""
        if self.pidfd >= 0:
            readable(self.pidfd, grace)
            # All of its group, as long as its own number is not another's: before it is waited for.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            deadline = time.monotonic() + END_SECONDS
            # Its end is that of the last of them.
            while readable(self.stderr, deadline - time.monotonic()) and self.read_stderr():
                pass
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck on a disk
                self._process.wait(max(0.0, deadline - time.monotonic()))
            os.close(self.pidfd)
            os.close(self.stderr)
            self.pidfd = self.stderr = -1
        return f"{self._end()}; {self.said()}"

    def _end(self) -> str:
        code: int | None = self._process.returncode
        if code is None:
            return "it can't be ended yet"
        return f"was killed by {signal_name(-code)}" if code < 0 else f"exit code {code}"


def readable(fd: int, seconds: float) -> bool:
    """Whether there is something to read, or is within ``seconds``."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _lease(pid: int) -> Lease:
    return Lease("process", pid, int(stat_fields(pid)[19]))
