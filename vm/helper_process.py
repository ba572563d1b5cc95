"""A program beside a machine that serves it by one socket, and ends when that is closed.

So it never outlives the process that started it, whatever ends that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Sequence

from voidbus.vm.guest.descendants import stat_fields
from voidbus.vm.machine import Lease
from voidbus.vm.signal_name import signal_name

SAID_BYTES = 4096
"""How much of what it says is kept."""

END_SECONDS = 2.0
"""How long it may take to end once its socket is closed, before it is killed."""

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
            undo.callback(self._process.wait)
            undo.callback(self._process.kill)
            self.pidfd = os.pidfd_open(self._process.pid)
            """Readable when it has ended."""
            undo.callback(os.close, self.pidfd)
            # Its start time is read before anyone can reap it.
            self.lease = Lease("process", self.pid, int(stat_fields(self.pid)[19]))
            undo.pop_all()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

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

    def close(self) -> str:
        """Wait until it has ended, its socket closed, and else kill it. Tells how it ended. Again
        is fine."""
        if self.pidfd >= 0:
            if not readable(self.pidfd, END_SECONDS):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
                readable(self.pidfd, END_SECONDS)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck on a disk
                self._process.wait(END_SECONDS)
            os.close(self.pidfd)
            while self.read_stderr() and readable(self.stderr, 0):
                pass
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
    return bool(poll.poll(seconds * 1000))
