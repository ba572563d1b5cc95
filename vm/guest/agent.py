"""The agent in a machine: takes the host's connections and serves them.

In the process machine it is two processes. The *warden* holds the control socket, whose
other end only the host process has: at its end, or when the agent proper ends, the warden
kills every process below it (it is a subreaper, so orphans are below it too). The agent
proper holds a pipe from the warden and does the same when the warden is killed. So nothing
outlives the host process or either of the two. A parent-death signal would not do: it is tied
to the thread that forked, not to the process.

The first thing on the control socket is ``[u32 LE length][JSON settings]``, the secret
among them: never argv or environment, which others can read. After that each byte brings one
connected socket.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .connection import MAX_EXECS, Connection
from .descendants import Children, become_subreaper, kill_descendants
from .execution import Identity
from .files import Files
from .frames import MAX_PAYLOAD
from .handshake import EVERYTHING, Flags
from .place import Place
from .pty_session import MAX_SESSIONS

ALLOWLIST = "/etc/voidbox/allowed_commands.json"
MAX_CONNECTIONS = 16
KILL_SECONDS = 5.0

# Protocol, "Exec": limits of programs. The agent takes them itself and programs inherit them,
# because there is no moment between fork and exec at which threads may safely run code.
OPEN_FILES = 1024
FILE_BYTES = 100 * 1024 * 1024
PROCESSES = 512


class Settings(NamedTuple):
    """What an agent is started with. ``root`` is "" in a real machine. ``allowed`` None: the
    allowlist file decides, and without one everything is allowed. ``identity`` None: programs
    run as the agent's own user."""

    secret: bytes
    root: str = ""
    allowed: tuple[str, ...] | None = None
    env: tuple[tuple[str, str], ...] = ()
    identity: Identity | None = None
    flags: Flags = EVERYTHING
    telemetry_root: int | None = None


class Agent:
    """Everything connections share, and the loop that accepts them."""

    def __init__(self, settings: Settings, log: Callable[[str], None]) -> None:
        self.secret = settings.secret
        self.flags = settings.flags
        self.identity = settings.identity
        self.telemetry_root = settings.telemetry_root
        self.place = Place(settings.root, settings.env)
        self.files = Files(self.place, settings.identity)
        self.children = Children()
        self.exec_slots = threading.BoundedSemaphore(MAX_EXECS)
        self.pty_slots = threading.BoundedSemaphore(MAX_SESSIONS)
        self.log = log
        self._allowed = settings.allowed
        self._allowed_read = settings.allowed is not None
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def refusal(self, program: str) -> str | None:
        """Why a program may not run, or None. The list is read before the first program runs
        and stays as it was then: a program can't widen it."""
        with self._lock:
            if not self._allowed_read:
                try:
                    self._allowed = _read_allowlist(self.place.path(ALLOWLIST))
                except (OSError, ValueError) as error:
                    return f"{ALLOWLIST} can't be used, so nothing may run: {error}"
                self._allowed_read = True
        if self._allowed is None or program.rpartition("/")[2] in self._allowed:
            return None
        return f"Command '{program}' is not in the allowed commands list"

    def request_shutdown(self) -> None:
        """Make ``serve`` return; from any thread or a signal handler."""
        os.eventfd_write(self._ended, 1)

    def release(self) -> None:
        """Close what the agent holds, once nothing uses it any more."""
        os.close(self._ended)

    def serve(self, listener: int, accept: Callable[[], socket.socket | None], *ends: int) -> None:
        """Accept until shut down, until ``accept`` returns None, or until one of the ``ends``
        descriptors is readable or hung up."""
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
                if listener in ready:
                    sock = accept()
                    if sock is None:
                        return
                    self._begin(sock)
        finally:
            signal.set_wakeup_fd(-1)
            os.close(changed)
            os.close(change)

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


def _read_allowlist(path: str) -> tuple[str, ...] | None:
    try:
        value: Any = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return None
    if isinstance(value, dict):
        value = value.get("allowed_commands")
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("it is not a JSON array of names")
    return tuple(value)


def apply_limits(*, dropped_user: bool) -> None:
    """Take the limits programs run under. The limit on processes counts by user over the whole
    system, so it is set only where programs have a user of their own."""
    limits = [(resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_FSIZE, FILE_BYTES)]
    if dropped_user:
        limits.append((resource.RLIMIT_NPROC, PROCESSES))
    for kind, wanted in limits:
        hard = resource.getrlimit(kind)[1]
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (soft, soft if dropped_user else hard))


def log_to_console(text: str) -> None:
    """One line on standard error, which is the machine's console."""
    try:
        os.write(2, f"guest-agent: {text}\n".encode(errors="replace"))
    except OSError:
        return


# -- the process machine ------------------------------------------------------------------


def read_settings(control: socket.socket) -> Settings:
    """The settings the host sends first. Raises ValueError when they are not whole."""
    (length,) = struct.unpack("<I", _read_exactly(control, 4))
    if length > MAX_PAYLOAD:
        raise ValueError(f"settings of {length} bytes")
    values = json.loads(_read_exactly(control, length))
    allowed = values["allowed"]
    return Settings(
        bytes.fromhex(values["secret"]),
        values["root"],
        None if allowed is None else tuple(allowed),
        tuple((key, value) for key, value in values["env"]),
    )


def _read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ValueError("the host closed the control socket before the settings were whole")
        data += part
    return data


def _serve_process(control: socket.socket, lifeline: int) -> int:
    """The agent proper, below the warden."""
    become_subreaper()
    apply_limits(dropped_user=False)
    settings = read_settings(control)
    agent = Agent(settings._replace(telemetry_root=os.getpid()), log_to_console)
    agent.place.prepare()

    def accept() -> socket.socket | None:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data or not fds:
            return None
        return socket.socket(fileno=fds[0])

    agent.serve(control.fileno(), accept, lifeline)
    kill_descendants(os.getpid(), KILL_SECONDS)
    return 0


def _guard(control: socket.socket, agent: int, held: int) -> int:
    """The warden: wait for the end of the host or the agent, then end everything below."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    asked, ask = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(ask)
    pidfd = os.pidfd_open(agent)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(control, select.POLLRDHUP)
    poll.register(asked, select.POLLIN)
    poll.poll()
    kill_descendants(os.getpid(), KILL_SECONDS)
    os.close(held)
    code = 0
    try:
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == agent:
                code = os.waitstatus_to_exitcode(status)
    except ChildProcessError:
        pass
    return code if code >= 0 else 128 - code


def main(argv: list[str]) -> int:
    """Entry point of the process machine's agent; ``--control-fd`` names the control socket."""
    parser = argparse.ArgumentParser(prog="guest-agent")
    parser.add_argument("--control-fd", type=int, required=True)
    control = socket.socket(fileno=parser.parse_args(argv).control_fd)
    control.set_inheritable(False)
    become_subreaper()
    lifeline, held = os.pipe2(os.O_CLOEXEC)
    agent = os.fork()  # no thread exists yet
    if agent != 0:
        os.close(lifeline)
        return _guard(control, agent, held)
    os.close(held)
    code = 1
    try:
        code = _serve_process(control, lifeline)
    except Exception as error:  # noqa: BLE001 - the console must have it, whatever it is
        log_to_console(f"stopped: {type(error).__name__}: {error}")
    finally:
        # Connection threads may hold on to a host that does not read; they end with us.
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
