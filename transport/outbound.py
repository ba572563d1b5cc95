"""The numbers of a node's asks and tells, and the way of all its envelopes to the queue."""

from __future__ import annotations

import threading
from itertools import count

from voidbus.transport.delivery import Ask, PendingAsks
from voidbus.transport.envelope import BODY_LIMIT, DEADLINE_LIMIT, Envelope, FrameError
from voidbus.transport.fault import FaultReason
from voidbus.transport.socket_loop import SocketLoop

# Above this many characters of key and trace the header's limit is looked at before queuing.
_LONG_FIELDS = 512


class Outbound:
    """Queues what a node sends. For any thread. The methods return a reason where it can't leave.

    Numbers leave in their order, whichever threads send: the receiver takes what is far behind for
    a replay (`replay.py`), and a thread may be held up for as long as the system likes.
    """

    def __init__(self, loop: SocketLoop, asks: PendingAsks) -> None:
        self._loop = loop
        self._asks = asks
        self._numbers = count(1)
        self._lock = threading.Lock()

    def new_number(self) -> int:
        """A number for an ask that does not leave."""
        return next(self._numbers)

    def ask(self, envelope: Envelope, node: str, ask: Ask) -> tuple[FaultReason, str] | None:
        """Number an ASK, wait for its answer from `node`, and queue it."""
        with self._lock:
            number = envelope.sequence = next(self._numbers)
            must_wake = self._asks.add(number, node, ask)
            if must_wake is None:
                return FaultReason.OVERLOADED, "too many asks wait for their replies"
            fault = self.submit(envelope)
        if fault is not None:
            self._asks.take(number)
        if must_wake:  # in any case: later asks rely on the sleeper's having been told
            self._loop.timers_changed()
        return fault

    def tell(self, envelope: Envelope) -> tuple[FaultReason, str] | None:
        """Number a TELL and queue it."""
        with self._lock:
            envelope.sequence = next(self._numbers)
            return self.submit(envelope)

    def submit(self, envelope: Envelope) -> tuple[FaultReason, str] | None:
        """Queue an envelope that has the number it needs."""
        if not envelope.deadline < DEADLINE_LIMIT:
            return FaultReason.INVALID, "its deadline is no time; give a timeout in seconds"
        long_fields = len(envelope.key) + len(envelope.trace) > _LONG_FIELDS
        if len(envelope.body) > BODY_LIMIT or envelope.attachments or long_fields:
            try:
                envelope.frames()
            except FrameError as error:
                return FaultReason.TOO_LARGE, str(error)
        return self._loop.submit(envelope)
