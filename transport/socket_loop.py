"""The thread that owns a node's sockets, and the queue to it.

ZeroMQ's sockets are not thread-safe: only this thread uses them. While it sleeps it waits on their
descriptors (ZMQ_FD). Such a descriptor tells of a change once: whoever has used a socket must look
whether something to read has come meanwhile (zmq_getsockopt(3), ZMQ_FD).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import zmq

from voidbus.transport.envelope import Envelope
from voidbus.transport.fault import FaultReason
from voidbus.transport.wire import readable, receive_frames, send_frames

_monotonic = time.monotonic
_log = logging.getLogger("voidbus.transport")

# Messages read from one socket before the others get their turn.
_BURST = 256
# The longest sleep (milliseconds): poll's timeout is a C int and a deadline may be any time.
_LONGEST_SLEEP = 3_600_000


class LoopOwner(Protocol):
    """The node behind a loop. All of it is called on the thread."""

    def open_sockets(self) -> None:
        """Open the sockets."""

    def close_sockets(self) -> None:
        """Close them in a fixed order."""

    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """The sockets to read."""

    def take_frames(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        """A message came."""

    def transmit(self, envelope: Envelope) -> None:
        """Send an envelope."""

    def next_timer(self) -> float | None:
        """When `on_timer` has something to do next (monotonic). Asked after `on_timer`."""

    def on_timer(self, now: float) -> None:
        """The time of a timer has come, or `timers_changed` was called."""


class SocketLoop:
    """See the module. `counters` gets `outbound_full`, `frames_raised` and `callbacks_raised`."""

    def __init__(
        self,
        name: str,
        owner: LoopOwner,
        counters: Counter[str],
        *,
        queue_limit: int,
        queue_bytes: int,
    ) -> None:
        self._name = name
        self._owner = owner
        self._counters = counters
        self._queue_limit = queue_limit
        self._queue_bytes = queue_bytes
        self._queue_lock = threading.Lock()
        self._outbound: deque[Envelope] = deque()
        self._outbound_bytes = 0
        self._calls: deque[Callable[[], object]] = deque()
        self._deferred: deque[Callable[[], object]] = deque()
        self._touched: set[zmq.Socket[bytes]] = set()
        self._unread: set[zmq.Socket[bytes]] = set()
        self._by_fd: dict[int, zmq.Socket[bytes]] = {}
        self._poller = select.poll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._sleeping = False
        self._timers_changed = True
        self._wake_at: float | None = None
        self.closing = False
        self.closed = False
        self._thread = threading.Thread(target=self._run, name=f"bus-{name}", daemon=True)

    # -- for any thread --------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, envelope: Envelope) -> tuple[FaultReason, str] | None:
        """Queue an envelope; the reason where it can't be taken."""
        if self.closing:
            return FaultReason.CLOSED, "this node was closed"
        size = envelope.size
        with self._queue_lock:
            has_room = (
                len(self._outbound) < self._queue_limit
                and self._outbound_bytes + size <= self._queue_bytes
            )
            if has_room:
                self._outbound_bytes += size
                self._outbound.append(envelope)
        if not has_room:
            self._counters["outbound_full"] += 1
            return FaultReason.OVERLOADED, "this node's outbound queue is full"
        self.wake_if_asleep()
        return None

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` on the thread."""
        if not self.closing:
            self._calls.append(function)
            self.wake_if_asleep()

    def timers_changed(self) -> None:
        """The owner's next timer may be earlier than it was. Who sets one must say so.

        To look at all of them after each message would cost an ask 25 calls at either end.
        """
        self._timers_changed = True
        self.wake_if_asleep()

    def wake_if_asleep(self) -> None:
        if self._sleeping:
            with self._wake_lock:
                if not self.closed:
                    self._sleeping = False
                    os.eventfd_write(self._wake_fd, 1)

    def guard(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call what a user of the bus gave us. What it raises is logged, counted, and ends here."""
        try:
            callback(*arguments)
        except Exception:  # noqa: BLE001 - not our code; logged, and it must not end the node
            self.count_raised()

    def count_raised(self) -> None:
        self._counters["callbacks_raised"] += 1
        _log.exception("node %s: a callback raised", self._name)

    def close(self, timeout: float) -> None:
        """Send what is queued, close the sockets, join the thread. Raises TimeoutError."""
        self.closing = True
        if self._thread.ident is not None:
            with self._wake_lock:
                if not self.closed:
                    os.eventfd_write(self._wake_fd, 1)
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"node {self._name}: its thread did not end in {timeout} s")
        with self._wake_lock:
            if not self.closed:
                self.closed = True
                os.close(self._wake_fd)

    # -- for the owner, on the thread ------------------------------------------------------

    def send(self, socket: zmq.Socket[bytes], frames: Sequence[bytes]) -> None:
        """Send one message. Raises zmq.Again and other ZMQErrors."""
        self._touched.add(socket)
        send_frames(socket, frames)

    def defer(self, function: Callable[[], object]) -> None:
        """Run `function` last before the thread sleeps.

        What came is handed over so: that wakes a thread, which needs the interpreter's lock at
        once; woken any earlier it would find that taken, sleep, and be woken a second time.
        """
        self._deferred.append(function)

    def sockets_changed(self) -> None:
        """The owner has other sockets now."""
        for fd in self._by_fd:
            with contextlib.suppress(KeyError):
                self._poller.unregister(fd)
        self._by_fd = {int(s.getsockopt(zmq.FD)): s for s in self._owner.sockets()}
        for fd in self._by_fd:
            self._poller.register(fd, select.POLLIN)
        # They may have something already, of which their descriptors told before.
        self._touched.clear()
        self._unread = set(self._by_fd.values())

    # -- the thread ------------------------------------------------------------------------

    def _run(self) -> None:
        self._poller.register(self._wake_fd, select.POLLIN)
        try:
            self._owner.open_sockets()
            self.sockets_changed()
            with contextlib.suppress(zmq.error.ContextTerminated):
                self._loop()
        finally:
            self._owner.close_sockets()

    def _loop(self) -> None:
        while True:
            self._sleep()
            self._work()
            while self._deferred:
                self.guard(self._deferred.popleft())
            if self.closing and not self._outbound:
                return

    def _sleep(self) -> None:
        # First the flag, then a look at the queues: who queues something sees the flag and wakes
        # us, or was early enough to be seen here. While we are awake nobody pays for waking us.
        self._sleeping = True
        busy = (
            self._outbound
            or self._calls
            or self._unread
            or self._deferred
            or self._timers_changed
            or self.closing
        )
        for fd, _ in self._poller.poll(0 if busy else self._milliseconds_to_timer()):
            socket = self._by_fd.get(fd)
            if socket is not None:
                self._unread.add(socket)
            else:
                os.eventfd_read(self._wake_fd)
        self._sleeping = False

    def _work(self) -> None:
        for _ in range(len(self._unread)):
            socket = self._unread.pop()
            if not socket.closed:
                self._drain(socket)
            if not self._unread:
                break
        while self._calls:
            self.guard(self._calls.popleft())
        if self._outbound:
            self._flush()
        self._run_timers()
        self._look_again()

    def _run_timers(self) -> None:
        now = _monotonic()
        if self._timers_changed or (self._wake_at is not None and now >= self._wake_at):
            self._timers_changed = False
            self._owner.on_timer(now)
            self._wake_at = self._owner.next_timer()

    def _look_again(self) -> None:
        """Note which of the sockets just used have something to read."""
        while self._touched:
            socket = self._touched.pop()
            if not socket.closed and readable(socket):
                self._unread.add(socket)

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        """Read up to a burst of messages from a socket."""
        for number in range(_BURST):
            # The first is there: we were told so. Mostly it is the only one, and to look is cheaper
            # than the exception; in a burst the exception ends it, once.
            if number == 1 and not readable(socket):
                return
            try:
                frames = receive_frames(socket)
            except zmq.Again:
                return
            try:
                self._owner.take_frames(socket, frames)
            except zmq.error.ContextTerminated:
                raise
            except Exception:  # noqa: BLE001 - whatever a peer sent, the node lives on
                self._counters["frames_raised"] += 1
                _log.exception("node %s: could not handle a message", self._name)
            if socket.closed:
                return
        self._unread.add(socket)

    def _flush(self) -> None:
        sent = 0
        for _ in range(len(self._outbound)):
            envelope = self._outbound.popleft()
            sent += envelope.size
            self._owner.transmit(envelope)
        if sent:
            with self._queue_lock:
                self._outbound_bytes -= sent

    def _milliseconds_to_timer(self) -> int:
        if self._wake_at is None:
            return -1
        return min(max(0, int((self._wake_at - _monotonic()) * 1000) + 1), _LONGEST_SLEEP)
