"""A micro-VM that is a QEMU process, accelerated by KVM where that works and emulated where not."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import ClassVar

from voidbus.vm.agent_machine import KILL_SECONDS
from voidbus.vm.console import ConsoleRing
from voidbus.vm.guest.descendants import stat_fields
from voidbus.vm.image_machine import AGENT_PORT, ImageMachine
from voidbus.vm.machine import Lease, MachineError, MachineExit, MachineSpec
from voidbus.vm.qemu.command import Layout, command
from voidbus.vm.qemu.devices import Devices
from voidbus.vm.qemu.monitor import Monitor
from voidbus.vm.qemu.process import INSTALL, PROGRAM, find_program, spawn
from voidbus.vm.signal_name import signal_name

log = logging.getLogger(__name__)

CONSOLE_RATE = 1024 * 1024
"""Bytes of console taken a second; a guest that writes more waits for its serial port."""

_CONSOLE_PIECE = 64 * 1024
_ERROR_BYTES = 4096


class QemuMachine(ImageMachine):
    """One QEMU process and what serves its devices. It ends with the thread that watches it, and
    so with this process; see `process`."""

    name: ClassVar[str] = "qemu"
    isolation: ClassVar[str] = "vm"

    # A connection waits in the device until the driver is up, and is refused at once by a guest
    # that does not listen yet. So nothing is gained by giving one up; and an agent that is just
    # up, which answers late where it is emulated, would have to serve another.
    pong_wait = (10.0, 10.0)

    def __init__(
        self,
        spec: MachineSpec,
        *,
        on_exit: Callable[[MachineExit], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        super().__init__(spec, on_exit=on_exit, on_lease=on_lease)
        self._errors = ConsoleRing(_ERROR_BYTES)
        self._devices: Devices | None = None
        self._watcher: threading.Thread | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None
        self._broken: str | None = None
        self._console_read = 0  # bytes since the last pause

    # -- start -----------------------------------------------------------------------------

    def _launch(self, deadline: float) -> None:
        program = find_program(PROGRAM)
        if program is None:
            raise MachineError(f"machine {self.spec.name}: {PROGRAM} is not installed: {INSTALL}")
        devices = Devices(self.spec, on_failed=self._fail, on_lease=self._on_lease)
        self._devices = devices  # closed by `close`, whatever happens now
        devices.start(deadline)
        self._spawn(program, devices, deadline)

    def _spawn(self, program: str, devices: Devices, deadline: float) -> None:
        try:
            with contextlib.ExitStack() as ours:
                layout, console = devices.layout(program)
                for end in console:
                    ours.callback(end.close)
                errors, errors_in = os.pipe2(os.O_CLOEXEC)
                ours.callback(os.close, errors)
                theirs = contextlib.ExitStack()
                theirs.callback(os.close, errors_in)
                theirs.callback(devices.handed)
                started = threading.Event()
                watcher = threading.Thread(
                    target=self._own,
                    args=(layout, console.serial, errors, errors_in, theirs, started),
                    name=f"{self.spec.name}-qemu",
                    daemon=True,
                )
                self._monitor = Monitor(console.monitor)
                watcher.start()
                self._watcher = watcher
                ours.pop_all()  # the monitor is closed by `_release`, the rest by the thread
        except (OSError, ValueError, RuntimeError) as error:  # no descriptors, or no thread
            raise MachineError(
                f"machine {self.spec.name}: {program} could not be started: {error}"
            ) from error
        # It forks and executes, for which a host that is out of breath may take long; a start that
        # was given next to no time ends for a better reason than that.
        if not started.wait(max(KILL_SECONDS, deadline - time.monotonic())):
            raise MachineError(
                f"machine {self.spec.name}: {program} was not started in time; start it again, "
                "with more time, when the host is less busy"
            )
        if self._child is None:
            raise MachineError(
                f"machine {self.spec.name}: {program} could not be started: "
                f"{self._errors.last_lines(1)}"
            )
        if self._stopping.is_set():
            self.kill()

    def _connect(self) -> socket.socket:
        devices = self._devices
        if devices is None or self._gone.is_set():
            raise ConnectionError("the machine does not run")
        return devices.connect(AGENT_PORT)

    def offer_host_port(self, port: int) -> str | None:
        return None if self._devices is None else self._devices.offer_host_port(port)

    def _image_env(self) -> tuple[tuple[str, str], ...]:
        return () if self._devices is None else self._devices.env

    # -- the thread that owns the process --------------------------------------------------

    def _own(
        self,
        layout: Layout,
        serial: socket.socket,
        errors: int,
        errors_in: int,
        theirs: contextlib.ExitStack,
        started: threading.Event,
    ) -> None:
        monitor = self._monitor
        assert monitor is not None
        with contextlib.ExitStack() as ours:
            ours.callback(started.set)
            ours.callback(self._gone.set)
            ours.callback(serial.close)
            ours.callback(os.close, errors)
            try:
                child, pidfd = self._execute(layout, errors_in, theirs)
            except OSError as error:
                self._errors.add(str(error).encode())
                return
            ours.callback(os.close, pidfd)
            started.set()
            self._watch(pidfd, monitor, serial, errors)
            code = child.wait()  # the pidfd said that it has ended
        self._on_exit(MachineExit(self._end_text(code), code if code >= 0 else 128 - code))

    def _execute(
        self, layout: Layout, errors_in: int, theirs: contextlib.ExitStack
    ) -> tuple[subprocess.Popen[bytes], int]:
        """Start QEMU, and hold it by a pidfd. Raises OSError; no QEMU is left then."""
        devices = self._devices
        assert devices is not None
        with theirs:
            child = spawn(
                command(layout), self.spec.scratch, layout.descriptors, errors_in, devices.user
            )
        try:
            pidfd = os.pidfd_open(child.pid)
        except OSError:  # out of descriptors
            child.kill()
            child.wait()
            raise
        try:
            # Its start time is read before anyone can reap it.
            lease = Lease("process", child.pid, int(stat_fields(child.pid)[19]))
        except OSError:
            os.close(pidfd)
            child.kill()
            child.wait()
            raise
        with self._lock:
            self._child = child
            given_up = self._stopping.is_set()
        self._on_lease(lease)
        if given_up:
            self._kill_child()
        return child, pidfd

    def _watch(self, pidfd: int, monitor: Monitor, serial: socket.socket, errors: int) -> None:
        """Read what QEMU says until it has ended and nothing is left to read."""
        serial.setblocking(False)
        poll = select.poll()
        for fd in (pidfd, monitor.fileno(), serial.fileno(), errors):
            poll.register(fd, select.POLLIN)
        handlers: dict[int, Callable[[], bool]] = {
            monitor.fileno(): monitor.feed,
            serial.fileno(): lambda: self._read_console(serial),
            errors: lambda: self._read_errors(errors),
        }
        pace = threading.Event()
        ended = False
        while not ended or handlers:
            # Once it has ended nothing more comes: what is not ready then has nothing left.
            ready = [fd for fd, _ in poll.poll(0 if ended else None)]
            if ended and not ready:
                return
            for fd in ready:
                if fd == pidfd:
                    ended = True
                    poll.unregister(fd)
                elif not handlers[fd]():
                    poll.unregister(fd)
                    del handlers[fd]
            if serial.fileno() in ready and not ended:
                self._pace_console(pace)

    def _read_console(self, serial: socket.socket) -> bool:
        try:
            data = serial.recv(_CONSOLE_PIECE)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._console.add(data)
        self._console_read += len(data)
        return bool(data)

    def _pace_console(self, pace: threading.Event) -> None:
        """After a piece's worth of console, a pause that keeps to the rate."""
        if self._console_read >= _CONSOLE_PIECE:
            pace.wait(self._console_read / CONSOLE_RATE)
            self._console_read = 0

    def _read_errors(self, errors: int) -> bool:
        data = os.read(errors, _ERROR_BYTES)
        self._errors.add(data)
        return bool(data)

    def _fail(self, reason: str) -> None:
        """A device can't go on; so the machine can't. On a device's thread."""
        self._broken = self._broken or reason
        self._kill_child()

    def _end_reason(self) -> str | None:
        if not self._gone.is_set():
            return None
        cause = self._broken or (None if self._monitor is None else self._monitor.cause)
        said = self._errors.last_lines(3)
        if cause is None:
            cause = "QEMU has ended"
        return f"{cause}; QEMU said: {said}" if said else cause

    def _end_text(self, code: int) -> str:
        if self._stopping.is_set() and self._broken is None:
            return "stopped"
        reason = self._end_reason() or ""
        if code < 0 and self._broken is None:
            return f"QEMU was killed by {signal_name(-code)}"
        return reason

    # -- stop ------------------------------------------------------------------------------

    def _terminate(self) -> None:
        if self._monitor is not None:
            self._monitor.tell("quit")

    def kill(self) -> None:
        with self._lock:
            self._stopping.set()
        self._kill_child()

    def _kill_child(self) -> None:
        with self._lock:
            child = self._child
            if child is not None and child.returncode is None:
                child.kill()

    def _release(self) -> None:
        if self._watcher is not None:
            self._watcher.join(KILL_SECONDS)
            if self._watcher.is_alive():  # the kernel has not ended it yet (stuck on a disk)
                self._kill_child()
                self._watcher.join(KILL_SECONDS)
                if self._watcher.is_alive():
                    log.error("machine %s: QEMU can't be ended yet", self.spec.name)
        if self._monitor is not None:
            self._monitor.close()
        if self._devices is not None:
            self._devices.close()
