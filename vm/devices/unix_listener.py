"""Listening Unix sockets that only their owner can reach."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from voidbus.vm.devices.event_loop import READ, EventLoop

MAX_PATH = 107
"""Bytes of a Unix socket's path (sun_path, less its end; unix(7))."""

PAUSE_SECONDS = 0.1
"""Before the next try to accept where descriptors were lacking."""


def check_path(path: Path, room: int = 0) -> None:
    """Raise ValueError unless the path, and ``room`` more bytes, fit a Unix socket's address."""
    length = len(os.fsencode(path)) + room
    if length > MAX_PATH:
        raise ValueError(
            f"the socket path {path} is too long ({length} bytes, at most {MAX_PATH}); "
            "use a shorter directory"
        )


def listen_unix(path: Path, backlog: int) -> socket.socket:
    """A non-blocking listening socket at ``path``, mode 0600. A socket left there by somebody
    else is replaced. Raises OSError, ValueError (path too long)."""
    check_path(path)
    if path.exists() and stat.S_ISSOCK(path.lstat().st_mode):
        path.unlink()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # The file's mode comes from the socket's own (Linux), so it is never open to others.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


class UnixListener:
    """Takes connections at a path for ``on_connection``, which gets each socket, in blocking mode,
    as its own. Where this process has no descriptor for one, the client waits in the backlog, and
    nobody spins. On the loop's thread, but ``listen``."""

    def __init__(
        self, path: Path, backlog: int, on_connection: Callable[[socket.socket], None]
    ) -> None:
        self._path = path
        self._backlog = backlog
        self._on_connection = on_connection
        self._socket: socket.socket | None = None
        self._accepting = False

    def listen(self, loop: EventLoop) -> None:
        """Bind the socket (mode 0600), before the loop starts; ``start`` takes what comes. Raises
        OSError, ValueError (path too long)."""
        self._loop = loop
        self._socket = listen_unix(self._path, self._backlog)

    def start(self) -> None:
        """Take connections, from now on or again."""
        self._accepting = True
        self._watch()

    def stop(self) -> None:
        """Let those who come wait in the backlog."""
        self._accepting = False
        if self._socket is not None:
            self._loop.unwatch(self._socket.fileno())

    def close(self) -> None:
        """Stop, and remove the path. Again is fine."""
        self.stop()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _watch(self) -> None:
        if self._socket is not None and self._accepting:
            # A pause may end after it was stopped and started again.
            self._loop.unwatch(self._socket.fileno())
            self._loop.watch(self._socket.fileno(), READ, self._accept)

    def _accept(self, _: int) -> None:
        if self._socket is None:
            return
        try:
            sock, _address = self._socket.accept()
        except BlockingIOError:
            return
        except OSError:
            self._loop.unwatch(self._socket.fileno())
            self._loop.later(PAUSE_SECONDS, self._watch)
            return
        self._on_connection(sock)
