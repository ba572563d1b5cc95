"""What a node answers to asks and tells that came to it, and what becomes of answers to its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial

from voidbus.transport.delivery import Ask, Delivery, PendingAsks, Receiver
from voidbus.transport.envelope import Envelope, Kind
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import CodecError, Message, message_type
from voidbus.transport.outbound import Outbound
from voidbus.transport.socket_loop import SocketLoop

_monotonic = time.monotonic

# The key of a FAULT that brings back a tell, which tells it from a late answer to an ask.
_RETURNED_TELL = "tell"
# How long the sender of a tell has to take it back (seconds).
_RETURN_SECONDS = 30.0


class Answers:
    """Of one node. `counters`, `receivers` and `asks` are the node's own, and change."""

    def __init__(
        self,
        instance: int,
        counters: Counter[str],
        receivers: Mapping[str, Receiver],
        asks: PendingAsks,
        outbound: Outbound,
        loop: SocketLoop,
    ) -> None:
        self._instance = instance
        self._counters = counters
        self._receivers = receivers
        self._asks = asks
        self._outbound = outbound
        self._loop = loop

    # -- to what came ------------------------------------------------------------------------

    def send(self, asked: Envelope, reply: Message, attachments: Sequence[bytes] = ()) -> None:
        """Answer an ASK, or tell the sender of a TELL what became of it."""
        try:
            body = reply.to_json()
        except ValueError as error:
            detail = f"the reply {reply.tag} cannot be written: {error}"
            reply = Fault(reason=FaultReason.INVALID, detail=detail, address=asked.dest)
            body, attachments = reply.to_json(), ()
        envelope = Envelope(
            Kind.FAULT if isinstance(reply, Fault) else Kind.REPLY,
            asked.sender,
            asked.dest,
            origin=asked.origin,
            sequence=asked.sequence,
            tag=reply.tag,
            version=reply.version,
            deadline=asked.deadline,
            key=_RETURNED_TELL if asked.kind is Kind.TELL else "",
            trace=asked.trace,
            body=body,
            attachments=attachments,
        )
        fault = self._outbound.submit(envelope)
        if fault is not None:
            self._counters["replies_dropped"] += 1
            if not isinstance(reply, Fault) and fault[0] is FaultReason.TOO_LARGE:
                self.send(asked, Fault(reason=fault[0], detail=fault[1], address=asked.dest))

    def send_back(
        self, envelope: Envelope, reason: FaultReason, detail: str, *, counted: bool = False
    ) -> None:
        """Tell the sender of an ASK or TELL why it was not handled."""
        if not counted:
            self._counters[f"fault_{reason.value}"] += 1
        if envelope.kind in (Kind.ASK, Kind.TELL):
            self.send(envelope, Fault(reason=reason, detail=detail, address=envelope.dest))

    # -- to what was sent from here ----------------------------------------------------------

    def take(self, envelope: Envelope, node: str) -> None:
        """End the ask that `envelope`, a REPLY or FAULT from `node`, answers."""
        ask = None
        if envelope.origin == self._instance:
            ask = self._asks.take(envelope.sequence, node)
        try:
            outcome = message_type(envelope.tag, envelope.version).from_json(envelope.body)
        except CodecError as error:
            self._counters["malformed"] += 1
            outcome = Fault(reason=FaultReason.INVALID, detail=str(error), address=envelope.sender)
        if ask is not None:
            self._loop.defer(partial(ask.end, outcome, envelope.attachments), serves=True)
        elif envelope.key == _RETURNED_TELL and isinstance(outcome, Fault):
            self._take_returned_tell(envelope, outcome)
        else:
            self._counters["late_replies"] += 1

    def _take_returned_tell(self, envelope: Envelope, fault: Fault) -> None:
        """A tell came back: its sender gets the fault as a message, if it still receives."""
        self._counters["returned_tells"] += 1
        path = envelope.dest.partition("/")[2]
        receiver = self._receivers.get(path)
        if receiver is not None and envelope.origin == self._instance:
            returned = Delivery(
                path, envelope.sender, fault, deadline=_monotonic() + _RETURN_SECONDS
            )
            self._loop.guard(receiver.deliver, returned)

    def not_sent(self, envelope: Envelope, reason: FaultReason, detail: str) -> None:
        """Tell who sent an envelope here that it could not leave, or count it."""
        if envelope.kind is Kind.ASK:
            ask = self._asks.take(envelope.sequence)
            if ask is not None:
                self.fail(ask, reason, detail)
        elif envelope.kind is Kind.TELL:
            self._counters[f"fault_{reason.value}"] += 1
            self._take_returned_tell(
                Envelope(Kind.FAULT, envelope.sender, envelope.dest, origin=self._instance),
                Fault(reason=reason, detail=detail, address=envelope.dest),
            )
        elif envelope.kind is Kind.PUBLISH:
            self._counters["publications_dropped"] += 1
        else:
            self._counters["replies_dropped"] += 1

    def too_large(self, envelope: Envelope, detail: str) -> None:
        """As `not_sent`, for one that can't be written."""
        self.not_sent(envelope, FaultReason.TOO_LARGE, detail)

    def fail(self, ask: Ask, reason: FaultReason, detail: str) -> None:
        """End an ask from here with a fault, and count that, unless it has ended already."""
        if ask.end(Fault(reason=reason, detail=detail, address=ask.address)):
            self._counters[f"fault_{reason.value}"] += 1
