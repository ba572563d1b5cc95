"""A machine that is only a local process in a scratch directory. No isolation whatsoever."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from voidbus.vm.agent_machine import KILL_SECONDS, AgentMachine
from voidbus.vm.guest.descendants import descendants, kill_descendants, send_signal, stat_fields
from voidbus.vm.guest.place import HostDirectory
from voidbus.vm.machine import Lease, MachineError, MachineExit, MachineSpec
from voidbus.vm.process.mounts import link_mounts, not_enforced
from voidbus.vm.signal_name import signal_name

_GUEST = Path(__file__).resolve().parent.parent / "guest"
_SIDECAR = _GUEST.parent.parent / "sidecar"

TOOLS = {
    "claudio": _GUEST / "claudio.py",
    "claude-code": _GUEST / "claudio.py",
    "void-message": _SIDECAR / "void_message.py",
    "void-mcp": _SIDECAR.parent / "mcp/void_mcp.py",
}
"""Programs every guest has, and the file each of them is."""


class ProcessMachine(AgentMachine):
    """The guest agent as a child process. Everything below it ends with it, with this object's
    process, and with ``kill``; see ``vm/guest/warden.py`` for how."""

    name: ClassVar[str] = "process"
    isolation: ClassVar[str] = "none"

    # A local stream loses nothing, so one patient try is the quickest.
    pong_wait = (1.0, 5.0)

    def __init__(
        self,
        spec: MachineSpec,
        *,
        on_exit: Callable[[MachineExit], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        super().__init__(spec, on_exit=on_exit, on_lease=on_lease)
        self._child: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._mounts: tuple[HostDirectory, ...] = ()
        self._watcher: threading.Thread | None = None

    # -- start ----------------------------------------------------------------------------

    def _launch(self, deadline: float) -> None:
        self._mounts = link_mounts(self.spec)
        self.warnings = not_enforced(self._mounts)
        try:
            self._spawn()
        except OSError as error:
            raise MachineError(
                f"machine {self.spec.name}: the guest agent could not be started: {error}; "
                f"check the scratch directory {self.spec.scratch}"
            ) from error

    def _spawn(self) -> None:
        self._write_tools()
        ours, theirs = socket.socketpair()
        console, console_in = os.pipe2(os.O_CLOEXEC)
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_GUEST), "--control-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=console_in,
                stderr=console_in,
                pass_fds=(theirs.fileno(),),
                cwd=self.spec.scratch,
                start_new_session=True,
            )
        except OSError:
            os.close(console)
            ours.close()
            raise
        finally:
            os.close(console_in)
            theirs.close()
        pidfd = os.pidfd_open(child.pid)
        self._watcher = threading.Thread(
            target=self._watch,
            args=(child, pidfd, console),
            name=f"{self.spec.name}-watch",
            daemon=True,
        )
        with self._lock:
            self._child, self._control = child, ours
            stopped = self._stopping.is_set()
        # Before the watcher can reap it, its start time can be read.
        lease = Lease("process", child.pid, int(stat_fields(child.pid)[19]))
        self._watcher.start()
        self._on_lease(lease)
        if stopped:
            self.kill()
        else:
            with contextlib.suppress(OSError):  # a child that died is seen by the handshake
                ours.sendall(self._settings())

    def _settings(self) -> bytes:
        allowed = self.spec.allowed_commands
        text = json.dumps(
            {
                "secret": self.spec.secret.hex(),
                "root": str(self.spec.scratch),
                "allowed": None if allowed is None else list(allowed),
                "env": list(self.spec.env.items()),
                "mounts": self._mounts,
            }
        ).encode()
        return struct.pack("<I", len(text)) + text

    def _write_tools(self) -> None:
        folder = self.spec.scratch / "usr/local/bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name, program in TOOLS.items():
            # Not -I: a tool finds the files beside it by its own folder.
            command = shlex.join([sys.executable, "-E", "-s", "-S", str(program)])
            path = folder / name
            path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            path.chmod(0o755)

    def _connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with self._lock:
                if self._control is None:
                    raise ConnectionError("the machine is closed")
                socket.send_fds(self._control, [b"c"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        return ours

    # -- the guest's life -----------------------------------------------------------------

    def _watch(self, child: subprocess.Popen[bytes], pidfd: int, console: int) -> None:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(console, select.POLLIN)
        try:
            left = {pidfd, console}
            # The agent holds the console for as long as it lives, so a killed warden's machine
            # counts as ended only when that has ended too, or should have.
            deadline: float | None = None
            while left:
                wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
                ready = [fd for fd, _ in poll.poll(wait)]
                if not ready:
                    break
                for fd in ready:
                    if fd == console and (data := os.read(console, 4096)):
                        self._console.add(data)
                        continue
                    poll.unregister(fd)
                    left.discard(fd)
                    if fd == pidfd:
                        deadline = time.monotonic() + KILL_SECONDS
        finally:
            os.close(console)
            os.close(pidfd)
        # Popen's own code: negative for a signal.
        code = child.wait()
        self._gone.set()
        if self._stopping.is_set():
            reason = "stopped"
        elif code < 0:
            reason = f"the guest agent was killed by {signal_name(-code)}"
        else:
            reason = f"the guest agent ended with exit code {code}"
        self._on_exit(MachineExit(reason, code if code >= 0 else 128 - code))

    # -- stop -----------------------------------------------------------------------------

    def _terminate(self) -> None:
        if self._child is not None and not self._gone.is_set():
            self._child.send_signal(signal.SIGTERM)  # does nothing once it was reaped

    def kill(self) -> None:
        with self._lock:
            self._stopping.set()
            child, control = self._child, self._control
        if child is None or self._gone.is_set():
            return
        # The agent first, so that it starts nothing new; its orphans fall to the warden.
        below = descendants(child.pid)
        send_signal(below, signal.SIGKILL)
        if control is not None:
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        child = self._child
        if child is not None and not self._gone.wait(KILL_SECONDS):
            # The warden does not run (stopped, or stuck): do its work from here.
            kill_descendants(child.pid, KILL_SECONDS, spare=(child.pid,))
            child.kill()
        if self._watcher is not None:
            self._watcher.join()
        with self._lock:
            control, self._control = self._control, None
        if control is not None:
            control.close()
