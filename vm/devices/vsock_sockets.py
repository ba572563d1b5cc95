"""The host's side of a socket device: Unix sockets, by the convention of Firecracker and Cloud
Hypervisor, so that their tools work with it."""

from __future__ import annotations

import functools
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path

from voidbus.vm.devices.event_loop import HANGUP, READ, EventLoop
from voidbus.vm.devices.unix_listener import UnixListener, check_path

MAX_GREETERS = 128
"""Clients that have not yet said which port they want."""
GREETING_SECONDS = 5.0
"""How long they may take to."""

_LINE = re.compile(rb"CONNECT (\d{1,10})\r?\n")
_MAX_LINE = 32
_BACKLOG = 128

Connect = Callable[[int, socket.socket, Callable[[int], bool]], None]


def open_host_port(sockets_path: Path, port: int) -> socket.socket:
    """Connect to what the host has behind a port: the Unix socket ``<sockets_path>_<port>``.
    Never waits. Raises OSError: nobody is there, or has no room."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        sock.connect(f"{sockets_path}_{port}")
    except OSError:
        sock.close()
        raise
    return sock


class HostSockets:
    """Listens at ``path`` for programs of the host. Each says ``CONNECT <port>\\n``, and its
    socket is handed to ``connect`` with what to call when the guest accepts, which answers
    ``OK <host port>\\n``. On the loop's thread."""

    def __init__(self, path: Path, connect: Connect) -> None:
        """Raises ValueError when the path, with a port behind it, is too long."""
        check_path(path, room=len("_4294967295"))
        self._connect = connect
        self._listener = UnixListener(path, _BACKLOG, self._accept)
        self._greeters: dict[socket.socket, tuple[bytearray, float]] = {}
        self._sweeping = False

    def listen(self, loop: EventLoop) -> None:
        """Bind the socket (mode 0600), before the loop starts. Its end releases everything.
        Raises OSError."""
        self._loop = loop
        self._listener.listen(loop)
        loop.at_end(self._end)
        self._listener.start()

    def _accept(self, sock: socket.socket) -> None:
        if len(self._greeters) >= MAX_GREETERS:
            sock.close()
            return
        sock.setblocking(False)
        self._greeters[sock] = (bytearray(), time.monotonic() + GREETING_SECONDS)
        self._loop.watch(sock.fileno(), READ, functools.partial(self._read, sock))
        if not self._sweeping:
            self._sweeping = True
            self._loop.later(GREETING_SECONDS, self._sweep)

    def _sweep(self) -> None:
        now = time.monotonic()
        for sock, (_, deadline) in list(self._greeters.items()):
            if deadline <= now:
                self._drop(sock)
        self._sweeping = bool(self._greeters)
        if self._greeters:
            self._loop.later(1.0, self._sweep)

    def _read(self, sock: socket.socket, events: int) -> None:
        line, _ = self._greeters[sock]
        try:
            # Only looked at: what follows the line is the stream's.
            ahead = sock.recv(_MAX_LINE - len(line), socket.MSG_PEEK)
            end = ahead.find(b"\n") + 1
            line += sock.recv(end or len(ahead)) if ahead else b""
        except BlockingIOError:
            return
        except OSError:
            self._drop(sock)
            return
        if end:
            self._greet(sock, bytes(line))
        elif not ahead or len(line) >= _MAX_LINE or events & HANGUP:
            self._drop(sock)

    def _greet(self, sock: socket.socket, line: bytes) -> None:
        match = _LINE.fullmatch(line)
        if match is None:
            self._drop(sock)
            return
        self._loop.unwatch(sock.fileno())
        del self._greeters[sock]
        self._connect(int(match[1]), sock, functools.partial(self._answer, sock))

    @staticmethod
    def _answer(sock: socket.socket, local_port: int) -> bool:
        answer = b"OK %d\n" % local_port
        try:
            return sock.send(answer, socket.MSG_NOSIGNAL) == len(answer)
        except OSError:
            return False

    def _drop(self, sock: socket.socket) -> None:
        self._loop.unwatch(sock.fileno())
        del self._greeters[sock]
        sock.close()

    def _end(self) -> None:
        for sock in list(self._greeters):
            self._drop(sock)
        self._listener.close()
