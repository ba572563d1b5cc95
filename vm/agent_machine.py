"""What machines have in common whose guest runs the agent of `vm/guest`: start, channel, stop.

A backend says how its guest is launched, dialled, terminated and killed; this class keeps the
order of things, the deadlines and the errors.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable

from voidbus.vm.channel import GuestChannel
from voidbus.vm.connect import PONG_WAIT, Connected, connect_guest
from voidbus.vm.console import ConsoleRing
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.machine import (
    Forward,
    Lease,
    Machine,
    MachineError,
    MachineExit,
    MachineSpec,
    StopStep,
)

KILL_SECONDS = 2.0
"""The small constant on top of a stop's grace: what killing everything may take."""

_PORT_SECONDS = 1.0
"""How long a forwarded port may still be held by the connection before this one."""


class AgentMachine(Machine):
    """A machine that is reached through its guest agent."""

    pong_wait = PONG_WAIT
    """What the first try for a Pong is given, and the longest later one (seconds)."""

    def __init__(
        self,
        spec: MachineSpec,
        *,
        on_exit: Callable[[MachineExit], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        super().__init__(spec, on_exit=on_exit, on_lease=on_lease)
        self._lock = threading.Lock()
        self._start_lock = threading.Lock()
        self._stopping = threading.Event()
        self._gone = threading.Event()
        self._console = ConsoleRing()
        self._channels: list[GuestChannel] = []
        self._launched = False

    # -- what a backend says ---------------------------------------------------------------

    @abstractmethod
    def _launch(self, deadline: float) -> None:
        """Start the guest; from here on ``_gone`` is set when it has ended. Raises MachineError,
        having left nothing behind; looks at ``_stopping`` where it takes long."""

    @abstractmethod
    def _connect(self) -> socket.socket:
        """One stream connection to the guest agent. Raises OSError while there is none."""

    @abstractmethod
    def _terminate(self) -> None:
        """Tell what runs the guest to end it, without asking the guest."""

    @abstractmethod
    def _release(self) -> None:
        """Free every descriptor, thread and process; the guest was killed before."""

    def _ready(self, channel: GuestChannel, deadline: float, *, first: bool) -> None:
        """Called with each channel before anyone else has it. Raises ChannelFault."""

    def _end_reason(self) -> str | None:
        """Why the guest ended, as far as it is known."""
        return None

    # -- start -----------------------------------------------------------------------------

    def start(self, timeout: float) -> GuestChannel:
        deadline = time.monotonic() + timeout
        with self._start_lock:
            if self._launched:
                raise MachineError(f"machine {self.spec.name}: started already")
            if self._stopping.is_set():
                raise MachineError(f"machine {self.spec.name}: stopped")
            self._launched = True
            try:
                self._launch(deadline)
                return self._open_channel(deadline, first=True)
            except MachineError:
                self.kill()
                raise

    def reconnect(self, timeout: float) -> GuestChannel:
        deadline = time.monotonic() + timeout
        with self._start_lock:
            if not self._launched:
                raise MachineError(f"machine {self.spec.name}: not started")
            with self._lock:
                old, self._channels = self._channels, []
            for channel in old:
                channel.close()
            return self._open_channel(deadline, first=False)

    def _open_channel(self, deadline: float, *, first: bool) -> GuestChannel:
        try:
            connected = self._dial(max(0.0, deadline - time.monotonic()))
        except ChannelFault as fault:
            raise self._failure(fault.detail) from fault
        channel = GuestChannel(connected, dial=self._dial, name=self.spec.name)
        with self._lock:
            stopped = self._stopping.is_set()
            if not stopped:
                self._channels.append(channel)
        if stopped:
            channel.close()
            raise self._failure("stopped")
        try:
            self._ready(channel, deadline, first=first)
            for forward in self.spec.forwards:
                self._forward(channel, forward, deadline)
        except ChannelFault as fault:
            raise self._failure(fault.detail) from fault
        return channel

    def _forward(self, channel: GuestChannel, forward: Forward, deadline: float) -> None:
        pause = threading.Event()
        busy_until = min(deadline, time.monotonic() + _PORT_SECONDS)
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                channel.listen_forward(forward.guest_port, forward.host, left)
                return
            except ChannelFault as fault:
                if fault.reason != FaultReason.REFUSED or time.monotonic() >= busy_until:
                    raise
                pause.wait(0.02)

    def _dial(self, timeout: float) -> Connected:
        return connect_guest(
            self._connect,
            self.spec.secret,
            timeout,
            pong_wait=self.pong_wait,
            given_up=self._given_up,
        )

    def _given_up(self) -> str | None:
        if self._stopping.is_set():
            return "stopped"
        if self._gone.is_set():
            return self._end_reason() or "the guest agent has ended"
        return None

    def _failure(self, detail: str) -> MachineError:
        name = self.spec.name
        if self._stopping.is_set():
            return MachineError(f"machine {name}: stopped")
        lines = self._console.last_lines(10)
        said = f"its console: {lines}" if lines else "its console is empty"
        return MachineError(
            f"machine {name}: {detail}; {said}; start it again, with more time if it was slow"
        )

    def console(self) -> bytes:
        return self._console.value()

    # -- stop ------------------------------------------------------------------------------

    def stop(self, grace: float) -> StopStep:
        deadline = time.monotonic() + grace
        with self._lock:
            self._stopping.set()
            channel = self._channels[-1] if self._channels else None
        if not self._launched or self._gone.is_set():
            return StopStep.ALREADY_GONE
        if channel is not None and channel.shutdown(grace / 2):
            self._gone.wait(max(0.0, deadline - time.monotonic()))
            if self._gone.is_set():
                return StopStep.SHUTDOWN
        self._terminate()
        if self._gone.wait(max(0.0, deadline - time.monotonic())):
            return StopStep.TERMINATED
        self.kill()
        self._gone.wait(KILL_SECONDS)
        return StopStep.KILLED

    def close(self) -> None:
        self.kill()
        with self._start_lock:  # a start under way has seen the kill and ends
            with self._lock:
                self._stopping.set()
                channels, self._channels = self._channels, []
            with contextlib.ExitStack() as stack:
                for channel in channels:
                    stack.callback(channel.close)
                self._release()
