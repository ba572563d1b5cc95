"""Our mailbox behind pykka's inbox protocol, so that pykka's references and proxies work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pykka
from pykka.messages import _ActorStop

from voidbus.actors.runtime.mailbox import Mailbox, Overflow, Waited
from voidbus.transport.fault import BusError, Fault, FaultReason


class PykkaInbox:
    """What `pykka.ActorRef` puts into. Unlike pykka's own queue it loses no ask.

    Messages keep their order with the bus's data messages. A full mailbox raises BusError with
    `mailbox_full` at the teller or in the asker's future; a stop is taken nevertheless.
    """

    def __init__(self, mailbox: Mailbox, overflow: Overflow) -> None:
        self.mailbox = mailbox
        self.owner = ""
        self.handle: Callable[[Any], Any] = lambda _message: None
        self._may_shed = overflow is not Overflow.REFUSE
        self._stops: list[_PykkaItem] = []

    def put(self, envelope: Any, /) -> None:
        """Take an envelope. Raises BusError or ActorDeadError where a tell was not taken."""
        item = _PykkaItem(self, envelope)
        # A stop must be neither refused nor shed for room.
        reason = self.mailbox.put(item, control=item.stops and self._may_shed)
        if reason is FaultReason.MAILBOX_FULL and item.stops:
            reason = self.mailbox.put(item, control=True)
        if reason is None:
            return
        if envelope.reply_to is None and not item.stops:
            raise item.error(reason)
        item.refuse(reason)

    def get(self) -> Any:
        return self.mailbox.get()

    def empty(self) -> bool:
        statistics = self.mailbox.statistics()
        return statistics.depth + statistics.control_depth == 0

    def stopping(self, item: _PykkaItem) -> None:
        """Hold the answer to a stop until the actor has stopped, as pykka does."""
        self._stops.append(item)

    def stopped(self) -> None:
        """Answer who asked for the stop."""
        for item in self._stops:
            item.refuse(FaultReason.MAILBOX_CLOSED)


class _PykkaItem(Waited):
    """An envelope put by one of pykka's own references: handled as pykka would."""

    __slots__ = ("_envelope", "_inbox", "stops")

    def __init__(self, inbox: PykkaInbox, envelope: Any) -> None:
        self._inbox = inbox
        self._envelope = envelope
        self.stops = isinstance(envelope.message, _ActorStop)

    def __call__(self) -> None:
        reply_to = self._envelope.reply_to
        try:
            response = self._inbox.handle(self._envelope.message)
        except Exception:
            if reply_to is None:
                raise
            reply_to.set_exception()
            return
        except BaseException:
            # The asker must hear of it, but SystemExit is not for it to raise.
            self.refuse(FaultReason.MAILBOX_CLOSED)
            raise
        if self.stops:
            self._inbox.stopping(self)
        elif reply_to is not None:
            reply_to.set(response)

    def error(self, reason: FaultReason) -> Exception:
        owner = self._inbox.owner
        if reason is FaultReason.MAILBOX_FULL:
            detail = "its mailbox is full; try again later"
            return BusError(Fault(reason=reason, detail=detail, address=owner))
        return pykka.ActorDeadError(f"{owner} stopped before handling the message")

    def refuse(self, reason: FaultReason) -> None:
        reply_to = self._envelope.reply_to
        if reply_to is None:
            return
        if self.stops:
            reply_to.set(None)
            return
        error = self.error(reason)
        reply_to.set_exception((type(error), error, None))
