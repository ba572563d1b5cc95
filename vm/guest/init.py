"""The agent as the first process of a real machine: boot, serve, power off.

``/init`` of the image calls ``main``.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import TracebackType

from . import kernel, power
from .boot import AGENT_SERVES, Boot, set_clock
from .identity import SANDBOX

TERM_SECONDS = 0.3
"""What programs get between SIGTERM and SIGKILL when the machine is shut down. A run has asked
its programs to end before that, with the grace it allows."""

KILL_SECONDS = 1.0
"""How long the killed may take to be gone, and as long the connections to end."""


def main() -> int:
    """Be the machine's first process. Returns only when it is not."""
    if os.getpid() != 1:
        os.write(2, b"guest-agent: /init is for the kernel of a machine to start\n")
        return 1
    boot = Boot()
    try:
        _run(boot)
    except BaseException as error:  # noqa: BLE001 - the kernel panics when this process ends
        boot.log.fatal(f"stopped: {type(error).__name__}: {error}")
        boot.log.fatal(_origin(error.__traceback__))
    while True:
        try:
            power.turn_off(restart=boot.line.restart)
        except OSError as error:
            boot.log.fatal(f"the machine can't be turned off: {error.strerror}")
        time.sleep(1)


def _origin(where: TracebackType | None) -> str:
    import traceback

    return "".join(traceback.format_tb(where))


def _run(boot: Boot) -> None:
    os.environ.clear()
    os.environ.update({"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root"})
    os.umask(0o022)
    # A handler, since programs would inherit that it is ignored.
    signal.signal(signal.SIGINT, lambda *_: None)
    boot.run()
    # Threads and programs inherit it: no program gains privileges by a set-user-id file.
    kernel.give_up_new_privileges()
    _serve(boot)


def _serve(boot: Boot) -> None:
    from .agent import Agent, Settings
    from .configure_messages import Configure
    from .handshake import EVERYTHING
    from .limits import Limits, apply_limits

    def configure(message: Configure) -> tuple[str, ...]:
        warnings = list(boot.warnings)
        if message.seed:
            try:
                kernel.add_entropy(message.seed)
            except OSError as error:
                warnings.append(f"random numbers: {error.strerror}")
        if message.clock is not None and (fault := set_clock(message.clock)) is not None:
            warnings.append(fault)
        return tuple(warnings)

    python: tuple[str, ...] | None = None
    if boot.foreign:
        from . import foreign

        python = foreign.PYTHON

    settings = Settings(
        boot.line.secret or b"",
        identity=SANDBOX,
        flags=EVERYTHING,
        python=python,
        on_configure=configure,
    )
    apply_limits(Limits(), dropped_user=True)
    # The console may be slow, and a thread that writes there holds others up.
    threading.excepthook = lambda failed: boot.log.fault(
        f"a thread failed: {failed.exc_type.__name__}: {failed.exc_value}\n"
        f"{_origin(failed.exc_traceback)}"
    )
    agent = Agent(settings, boot.log.step)
    agent.rules.blocked = boot.blocked
    signal.signal(signal.SIGINT, lambda *_: agent.request_shutdown())
    power.take_over_secure_attention_key()
    listener = boot.listener
    assert listener is not None
    boot.mark(AGENT_SERVES)
    boot.step("serving")
    agent.serve(listener.fileno(), lambda: _accept(listener))
    boot.step("shutting down")
    end_programs()
    agent.close_connections(KILL_SECONDS)
    listener.close()


def _accept(listener: socket.socket) -> socket.socket | None:
    """The next connection of the host. Raises OSError: BlockingIOError when there is none, or
    when it is somebody else's, who has no business here."""
    sock, (cid, _) = listener.accept()
    if cid != socket.VMADDR_CID_HOST:
        sock.close()
        raise BlockingIOError
    sock.setblocking(True)
    return sock


def end_programs(term: float = TERM_SECONDS, kill: float = KILL_SECONDS) -> bool:
    """End every process but this one: SIGTERM, then after ``term`` seconds SIGKILL. False
    when some are still there ``kill`` seconds later."""
    from .descendants import children

    for number, seconds in ((signal.SIGTERM, term), (signal.SIGKILL, kill)):
        try:
            os.kill(-1, number)
        except ProcessLookupError:
            return True
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not _alive(children(os.getpid())):
                return True
            time.sleep(0.01)
    return False


def _alive(pids: set[int]) -> bool:
    from .descendants import stat_fields

    for pid in pids:
        try:
            if stat_fields(pid)[0] not in (b"Z", b"X"):
                return True
        except (OSError, IndexError):
            continue
    return False
