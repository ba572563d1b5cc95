"""A program on a terminal of its own, as an operator has it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

CTRL_C = b"\x03"


class Terminal:
    """Runs `command` on a pseudo-terminal of 30 lines and 100 columns. Use it with `with`.

    What is typed goes through the line discipline, so Ctrl-C is a signal for the foreground.
    """

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self.seen = b""
        self._ended = False
        self._master, slave = pty.openpty()
        try:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
            self.process = subprocess.Popen(
                command,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=dict(environ) | {"TERM": "xterm"},
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        except BaseException:
            os.close(self._master)
            raise
        finally:
            os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self._master)

    def type(self, data: bytes) -> None:
        os.write(self._master, data)

    def wait_for(self, pattern: str, timeout: float = 25.0) -> None:
        """Wait until what was printed since the last `wait_for` matches, and pass over it."""
        deadline = time.monotonic() + timeout
        while (found := re.search(pattern.encode(), self.seen)) is None:
            if not self._read(deadline):
                raise AssertionError(f"no {pattern!r}; what came last: {self.seen[-1500:]!r}")
        self.seen = self.seen[found.end() :]

    def end(self, timeout: float = 20.0) -> int:
        """Wait for the program's end, and read what it printed last. Returns its exit code."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        return self.process.wait(max(0.1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        if self._ended:
            return False
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: nobody has the terminal open any more
            data = b""
        self._ended = not data
        self.seen += data
        return bool(data)
