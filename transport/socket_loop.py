"""The loop that drives a node's sockets, the queue to it, and the node's thread.

ZeroMQ's sockets are not thread-safe: only the thread that has the lead (`lead.py`) uses them. While
it sleeps it waits on their descriptors (ZMQ_FD). Such a descriptor tells of a change once: whoever
has used a socket must look whether something to read has come meanwhile (zmq_getsockopt(3)).
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
from typing import Protocol, TypeVar

import zmq

from voidbus.transport.envelope import Envelope
from voidbus.transport.fault import FaultReason
from voidbus.transport.lead import Lead
from voidbus.transport.wire import readable, receive_frames, send_frames

_monotonic = time.monotonic
T = TypeVar("T")
_log = logging.getLogger("voidbus.transport")

# Envelopes read from one socket before the others get their turn.
_BURST = 256
# The longest sleep (milliseconds): poll's timeout is a C int and a deadline may be any time.
_LONGEST_SLEEP = 3_600_000


class LoopOwner(Protocol):
    """The node behind a loop. All of it is called by the thread that drives."""

    def open_sockets(self) -> None:
        """Open the sockets."""

    def close_sockets(self) -> None:
        """Close them in a fixed order."""

    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """The sockets to read."""

    def take_frames(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> int:
        """A message came; how many envelopes it held."""

    def transmit(self, envelopes: Sequence[Envelope]) -> None:
        """Send envelopes; those for one node in their order."""

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
        self._deferred: deque[tuple[Callable[[], object], bool]] = deque()
        self._touched: set[zmq.Socket[bytes]] = set()
        self._unread: set[zmq.Socket[bytes]] = set()
        self._bursting = False  # more than one message has come at once
        self._by_fd: dict[int, zmq.Socket[bytes]] = {}
        self._routers: frozenset[zmq.Socket[bytes]] = frozenset()
        self._poller = select.poll()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()
        self._sleeping = False
        self.main_thread = threading.main_thread().ident or 0
        self._lead = Lead()
        self._latch: threading.Lock | None = None  # what the thread that drives waits for
        self._serves = False  # what is being handed over is for a thread that may drive next
        self._served = False  # one that waited was woken so
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
        self._wake()
        return None

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` on the thread that drives."""
        if not self.closing:
            self._calls.append(function)
            self._wake()

    def timers_changed(self) -> None:
        """The owner's next timer may be earlier than it was. Who sets one must say so.

        To look at all of them after each message would cost an ask 25 calls at either end.
        """
        self._timers_changed = True
        self._wake()

    def wait(self, latch: threading.Lock, timeout: float) -> bool:
        """As Driver.wait. Where nobody drives the sockets, the thread that waits does."""
        if timeout and self._lead.take():
            deadline = _monotonic() + timeout if timeout > 0 else None
            try:
                if self._drive(latch, deadline):
                    return True
            finally:
                self._latch = None
                self._lead.leave()
            if deadline is not None:
                timeout = max(0.0, deadline - _monotonic())
        return latch.acquire(timeout=timeout)

    def released(self, latch: threading.Lock) -> None:
        """`latch` was released: the thread that waits for it wakes, also where it drives."""
        if self._serves:
            self._served = True
        if self._latch is latch:
            self._wake()

    def _wake(self) -> None:
        """Wake whoever drives, where it sleeps. Where nobody drives, somebody will in a moment."""
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
            self._lead.recall()
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"node {self._name}: its thread did not end in {timeout} s")
        with self._wake_lock:
            if not self.closed:
                self.closed = True
                os.close(self._wake_fd)

    # -- for the owner, on the thread that drives ------------------------------------------

    def send(self, socket: zmq.Socket[bytes], frames: Sequence[bytes]) -> None:
        """Send one message. Raises zmq.Again and other ZMQErrors."""
        self._touched.add(socket)
        send_frames(socket, frames)

    def take(self, handle: Callable[..., T], *arguments: object) -> T | None:
        """Handle something that came. What that raises is logged, counted, and ends here."""
        try:
            return handle(*arguments)
        except zmq.error.ContextTerminated:
            raise
        except Exception:  # noqa: BLE001 - whatever a peer sent, the node lives on
            self._counters["frames_raised"] += 1
            _log.exception("node %s: could not handle a message", self._name)
            return None

    def defer(self, function: Callable[[], object], *, serves: bool = False) -> None:
        """Run `function` last before the thread sleeps. The thread it `serves` may drive next.

        What came is handed over so: that wakes a thread, which needs the interpreter's lock at
        once; woken any earlier it would find that taken, sleep, and be woken a second time.
        """
        self._deferred.append((function, serves))

    def sockets_changed(self) -> None:
        """The owner has other sockets now."""
        for fd in self._by_fd:
            with contextlib.suppress(KeyError):
                self._poller.unregister(fd)
        self._by_fd = {int(s.getsockopt(zmq.FD)): s for s in self._owner.sockets()}
        for fd in self._by_fd:
            self._poller.register(fd, select.POLLIN)
        self._routers = frozenset(s for s in self._by_fd.values() if s.type == zmq.ROUTER)
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
            self._turn(None, None)
            if self.closing and not self._outbound:
                return  # and keep the lead: there is nothing left to drive
            if self._served and not self._has_work():
                self._lead.stand_by()

    def _drive(self, latch: threading.Lock, deadline: float | None) -> bool:
        """Drive until `latch` is had. False where that is for another thread to wait for."""
        self._latch = latch
        try:
            self._flush()
            while not self.closing:
                self._turn(latch, deadline)
                if latch.acquire(False):
                    return True
                if self._served or (deadline is not None and _monotonic() >= deadline):
                    return False
        except zmq.error.ContextTerminated:
            return False  # the node's thread will see it too, and end
        return False

    def _turn(self, latch: threading.Lock | None, deadline: float | None) -> None:
        """Sleep until there is something to do, and do it."""
        self._sleep(latch, deadline)
        self._served = False
        self._work()
        while self._deferred:
            function, self._serves = self._deferred.popleft()
            self.guard(function)
        self._serves = False

    def _has_work(self) -> bool:
        return bool(
            self._outbound
            or self._calls
            or self._deferred
            or self._unread
            or self._timers_changed
            or self.closing
        )

    def _sleep(self, latch: threading.Lock | None, deadline: float | None) -> None:
        # First the flag, then a look at the queues: who queues something sees the flag and wakes
        # us, or was early enough to be seen here. While we are awake nobody pays for waking us.
        self._sleeping = True
        self._look_again()
        busy = self._has_work() or (latch is not None and not latch.locked())
        for fd, _ in self._poller.poll(0 if busy else self._milliseconds_to(deadline)):
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
                self._bursting = True

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        """Read up to a burst of envelopes from a socket, and what came with the last of them."""
        routed = socket in self._routers
        taken = number = 0
        while taken < _BURST:
            # Mostly there is one message, and before we sleep we look again; in a burst zmq.Again,
            # which costs three looks, ends it.
            if number == 1 and not self._bursting:
                self._touched.add(socket)
                return
            try:
                frames = receive_frames(socket, routed=routed)
            except zmq.Again:
                self._bursting = number > 1
                return
            taken += self.take(self._owner.take_frames, socket, frames) or 1
            number += 1
            if socket.closed:
                return
        self._unread.add(socket)

    def _flush(self) -> None:
        waiting = len(self._outbound)
        if not waiting:
            return
        envelopes = [self._outbound.popleft() for _ in range(waiting)]
        sent = sum([envelope.size for envelope in envelopes])
        try:
            self._owner.transmit(envelopes)
        finally:
            with self._queue_lock:
                self._outbound_bytes -= sent

    def _milliseconds_to(self, deadline: float | None) -> int:
        """How long to sleep, for the timers and whoever drives."""
        moment = self._wake_at
        if deadline is not None and (moment is None or deadline < moment):
            moment = deadline
        if moment is None:
            return -1
        return min(max(0, int((moment - _monotonic()) * 1000) + 1), _LONGEST_SLEEP)
