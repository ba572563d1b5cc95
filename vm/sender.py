"""Puts frames on a connection from a thread of its own, so that nobody waits for the guest."""

from __future__ import annotations

import collections
import select
import socket
import threading
import time
from collections.abc import Callable

from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.frames import MAX_PAYLOAD

MAX_QUEUED = 2 * MAX_PAYLOAD
"""Bytes that may wait to be sent: two of the largest frames."""

_FRAME_COST = 64
"""What a waiting frame takes beside its bytes: a guest can ask for many short answers and take
none."""

WAIT_SECONDS = 10.0
FRAME_SECONDS = 60.0
"""A guest that takes nothing for the one, or not a whole frame in the other, is lost
(protocol, "Multiplex")."""


_FLAGS = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT


class Sender:
    """Sends frames in the order given. ``on_lost`` is called once, on the sender's thread,
    when the connection breaks; after that nothing is sent."""

    def __init__(self, sock: socket.socket, on_lost: Callable[[str], None], name: str) -> None:
        self._sock = sock
        self._on_lost = on_lost
        self._ready = threading.Condition()
        self._frames: collections.deque[bytes] = collections.deque()
        self._queued = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, frame: bytes) -> None:
        """Queue a frame; never blocks. Raises ChannelFault OVERLOADED or CLOSED."""
        with self._ready:
            if self._closed:
                raise ChannelFault(FaultReason.CLOSED, "the channel is closed")
            if self._queued + len(frame) + _FRAME_COST > MAX_QUEUED:
                raise ChannelFault(
                    FaultReason.OVERLOADED,
                    f"{self._queued} bytes wait for a guest that does not take them",
                )
            self._frames.append(frame)
            self._queued += len(frame) + _FRAME_COST
            self._ready.notify()

    def close(self) -> None:
        """Stop, joining the thread. The caller has shut the socket down, so no send lasts."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._frames and not self._closed:
                    self._ready.wait()
                if self._closed:
                    return
                frame = self._frames.popleft()
            try:
                self._send(frame)
            except OSError as error:
                self._on_lost(f"sending failed: {error}")
                return
            with self._ready:
                self._queued -= len(frame) + _FRAME_COST

    def _send(self, frame: bytes) -> None:
        pending = memoryview(frame)
        deadline = time.monotonic() + FRAME_SECONDS
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while pending:
            try:
                pending = pending[self._sock.send(pending, _FLAGS) :]
            except BlockingIOError:
                wait = min(WAIT_SECONDS, deadline - time.monotonic())
                if wait <= 0 or not poll.poll(wait * 1000):
                    raise TimeoutError("the guest takes no data") from None
