"""One terminal session, which has a connection to itself."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Callable

from .descendants import Children, descendants, send_signal
from .frames import Frame, MessageType, ProtocolError, split_message
from .identity import Identity
from .place import Place
from .pty_messages import PtyOpen, decode_pty_resize, encode_pty_closed

MAX_SESSIONS = 4
"""Sessions at a time (protocol, "PTY")."""

GRACE_SECONDS = 2.0
"""How long a program that is not interactive may go on after the close (protocol, "PTY")."""

HANGUP_SECONDS = 1.0
"""From SIGHUP to SIGKILL (protocol, "PTY")."""

_INPUT_BYTES = 64 * 1024
_CHUNK = 4096
_LAUNCHER = __file__.rpartition("/")[0] + "/pty_launch.py"

Send = Callable[[MessageType, bytes], None]


class PtySession:
    """A program on a new terminal. The constructor raises OSError or ValueError when it
    can't be started; ``run`` blocks until it has ended."""

    def __init__(
        self, request: PtyOpen, place: Place, children: Children, identity: Identity | None
    ) -> None:
        self._children = children
        self._interactive = request.interactive
        self._master, slave = os.openpty()
        try:
            self._resize(request.cols, request.rows)
            if identity is not None:
                os.fchown(slave, identity.uid, identity.gid)  # it may open its terminal by name
            who = "-" if identity is None else f"{identity.uid}:{identity.gid}"
            lift = "lift" if request.interactive else "-"
            argv = [place.argument(text) for text in (request.program, *request.args)]
            self._child: subprocess.Popen[bytes] = children.start(
                [*place.python, "-I", "-S", _LAUNCHER, who, lift, *argv],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                cwd=place.working_dir(request.working_dir),
                env=place.environment(request.env, pty=True),
            )
        except (OSError, ValueError, subprocess.SubprocessError):
            os.close(self._master)
            raise
        finally:
            os.close(slave)
        os.set_blocking(self._master, False)
        self._input = bytearray()
        self._hung_up = False
        self._steps: list[tuple[float, int]] = []  # when to send which signal

    def _resize(self, cols: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def kill(self) -> None:
        """End the program and everything below it at once; from any thread."""
        if self._child.returncode is None:
            send_signal([self._child.pid, *descendants(self._child.pid)], signal.SIGKILL)

    def run(
        self, sock: socket.socket, receive: Callable[[], list[Frame] | None], send: Send
    ) -> None:
        """Serve the session: ``receive`` reads the socket once it is readable and returns
        None at its end. The last thing sent is PtyClosed, unless the host is gone."""
        exited = os.pidfd_open(self._child.pid)
        host_gone = False
        try:
            while not select.select([exited], [], [], 0)[0]:
                if not host_gone:
                    try:
                        host_gone = not self._turn(sock, exited, receive, send)
                    except (OSError, ProtocolError):
                        host_gone = True
                    if host_gone:
                        self.kill()
                else:
                    select.select([exited], [], [], HANGUP_SECONDS)
                    self.kill()
            self.kill()
            code = self._children.finish(self._child)
            if not host_gone:
                self._drain(send)
                send(MessageType.PTY_CLOSED, encode_pty_closed(code if code >= 0 else 128 - code))
        finally:
            os.close(exited)
            os.close(self._master)

    def _turn(
        self,
        sock: socket.socket,
        exited: int,
        receive: Callable[[], list[Frame] | None],
        send: Send,
    ) -> bool:
        poll = select.poll()
        poll.register(exited, select.POLLIN)
        # While the program does not read, neither do we: the host's bytes wait at the host.
        room = len(self._input) < _INPUT_BYTES
        poll.register(sock, select.POLLRDHUP | (select.POLLIN if room else 0))
        if not self._hung_up:
            poll.register(self._master, select.POLLIN | (select.POLLOUT if self._input else 0))
        wait = None
        if self._steps:
            wait = max(0.0, self._steps[0][0] - time.monotonic()) * 1000
        for fd, events in poll.poll(wait):
            if fd == sock.fileno():
                if room and events & select.POLLIN:
                    frames = receive()
                    if frames is None:
                        return False
                    for frame in frames:
                        self._take(frame)
                elif events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR):
                    return False
            elif fd == self._master:
                self._terminal(events, send)
        while self._steps and self._steps[0][0] <= time.monotonic():
            self._signal(self._steps.pop(0)[1])
        return True

    def _terminal(self, events: int, send: Send) -> None:
        if events & select.POLLOUT:
            self._feed()
        if events & select.POLLIN:
            send(MessageType.PTY_DATA, os.read(self._master, _CHUNK))
        elif events & select.POLLHUP:
            # Nobody holds the terminal, which stays "ready" for ever: only the exit is left.
            self._hung_up = True

    def _feed(self) -> None:
        try:
            del self._input[: os.write(self._master, self._input)]
        except BlockingIOError:
            return
        except OSError:
            self._input.clear()

    def _take(self, frame: Frame) -> None:
        body = split_message(frame.payload)[1]
        if frame.type == MessageType.PTY_DATA:
            self._input += body
        elif frame.type == MessageType.PTY_RESIZE:
            self._resize(*decode_pty_resize(body))
        elif frame.type == MessageType.PTY_CLOSE and not self._steps:
            hangup = time.monotonic() + (0 if self._interactive else GRACE_SECONDS)
            self._steps = [(hangup, signal.SIGHUP), (hangup + HANGUP_SECONDS, signal.SIGKILL)]

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._child.pid, number)
        except (ProcessLookupError, PermissionError):
            return

    def _drain(self, send: Send) -> None:
        try:
            while data := os.read(self._master, _CHUNK):
                send(MessageType.PTY_DATA, data)
        except OSError:  # EIO: the terminal's last holder is gone
            return
