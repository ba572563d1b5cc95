"""The agent of the process machine, which is two processes.

The *warden* holds the control socket, whose
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
import select
import signal
import socket
import struct
import sys

from .agent import Agent, Settings
from .descendants import kill_descendants
from .frames import MAX_PAYLOAD
from .kernel import become_subreaper
from .limits import Limits, apply_limits
from .place import HostDirectory

KILL_SECONDS = 5.0


def log_to_console(text: str) -> None:
    """One line on standard error, which is the machine's console."""
    try:
        os.write(2, f"guest-agent: {text}\n".encode(errors="replace"))
    except OSError:
        return


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
        mounts=tuple(HostDirectory(*mount) for mount in values["mounts"]),
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
    apply_limits(Limits(), dropped_user=False)
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
