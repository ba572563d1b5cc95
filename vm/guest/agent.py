"""The agent in a machine: takes the host's connections and serves them.

``warden.py`` starts it in the process machine, ``init.py`` as the first process of a real one.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from .configure_messages import Configure, Configured
from .connection import MAX_EXECS, Connection
from .descendants import Children
from .files import Files
from .handshake import EVERYTHING, Flags
from .identity import Identity
from .limits import Limits, apply_limits
from .place import HostDirectory, Place
from .pty_session import MAX_SESSIONS
from .rules import Rules

MAX_CONNECTIONS = 16

ACCEPT_PAUSE = 0.1
"""Seconds between tries when a connection can't be taken for want of something."""


class Settings(NamedTuple):
    """What an agent is started with. ``root`` is "" in a real machine. ``allowed`` None: the
    host tells, or its files do (see rules.py). ``identity`` None: programs run as the agent's
    own user. ``python`` starts the interpreter. ``mounts`` are the host's directories that are
    links below the root. ``on_configure`` does what is to be done to the machine when it is
    configured, and returns what went wrong since it booted."""

    secret: bytes
    root: str = ""
    allowed: tuple[str, ...] | None = None
    env: tuple[tuple[str, str], ...] = ()
    identity: Identity | None = None
    flags: Flags = EVERYTHING & ~Flags.CONFIGURE
    telemetry_root: int | None = None
    python: tuple[str, ...] | None = None
    mounts: tuple[HostDirectory, ...] = ()
    on_configure: Callable[[Configure], tuple[str, ...]] = lambda _: ()


class Agent:
    """Everything connections share, and the loop that accepts them."""

    def __init__(self, settings: Settings, log: Callable[[str], None]) -> None:
        self.secret = settings.secret
        self.flags = settings.flags
        self.identity = settings.identity
        self.telemetry_root = settings.telemetry_root
        self.place = Place(settings.root, settings.env, settings.python, settings.mounts)
        self.files = Files(self.place, settings.identity)
        self.children = Children()
        self.exec_slots = threading.BoundedSemaphore(MAX_EXECS)
        self.pty_slots = threading.BoundedSemaphore(MAX_SESSIONS)
        self.rules = Rules(
            settings.allowed,
            decided=settings.allowed is not None,
            path=self.place.path,
            take=self._take_limits,
        )
        self.log = log
        self._on_configure = settings.on_configure
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def _take_limits(self, limits: Limits) -> list[str]:
        return apply_limits(limits, dropped_user=self.identity is not None)

    def configure(self, message: Configure) -> Configured:
        """Take what the host says about this machine; once."""
        try:
            faults = self.rules.decide(message.allowed, message.limits)
        except (OSError, ValueError) as error:
            return Configured((), str(error))
        self.place.extra_env = message.env
        return Configured((*self._on_configure(message), *faults))

    def request_shutdown(self) -> None:
        """Make ``serve`` return; from any thread or a signal handler."""
        os.eventfd_write(self._ended, 1)

    def release(self) -> None:
        """Close what the agent holds, once nothing uses it any more."""
        os.close(self._ended)

    def serve(self, listener: int, accept: Callable[[], socket.socket | None], *ends: int) -> None:
        """Accept until shut down, until ``accept`` returns None, or until one of the ``ends``
        descriptors is readable or hung up. An OSError from ``accept`` is one connection's."""
        changed, change = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(change, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: self.request_shutdown())
        poll = select.poll()
        for fd in (listener, changed, self._ended, *ends):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                ready = {fd for fd, _ in poll.poll()}
                if ready & {self._ended, *ends}:
                    return
                if changed in ready:
                    os.read(changed, 4096)
                    self.children.reap_orphans()
                if listener in ready and not self._accept(accept):
                    return
        finally:
            signal.set_wakeup_fd(-1)
            os.close(changed)
            os.close(change)

    def _accept(self, accept: Callable[[], socket.socket | None]) -> bool:
        try:
            sock = accept()
        except BlockingIOError:
            return True  # it went away before it was taken
        except OSError as error:
            self.log(f"a connection could not be taken: {error.strerror}")
            time.sleep(ACCEPT_PAUSE)  # what is lacking is still lacking at once
            return True
        if sock is not None:
            self._begin(sock)
        return sock is not None

    def _begin(self, sock: socket.socket) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            self.log("too many connections; one refused")
            sock.close()
            return
        connection = Connection(sock, self)

        def run() -> None:
            try:
                connection.run()
            finally:
                with self._lock:
                    self._connections.pop(connection, None)

        thread = threading.Thread(target=run, name="connection", daemon=True)
        with self._lock:
            self._connections[connection] = thread
        thread.start()

    def close_connections(self, timeout: float) -> bool:
        """End every connection and what it started; False when some is not over by then."""
        deadline = time.monotonic() + timeout
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            connection.close()
        for thread in connections.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in connections.values())
