"""Messages that came before their actor knew what they are about."""

from __future__ import annotations

from collections.abc import Callable

from voidbus.actors.runtime.actor import LATER, Refuse
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import Message

_LIMIT = 1000


class EarlyMessages:
    """Used by one actor, in its thread."""

    def __init__(self) -> None:
        self.over = False
        self._waiting: list[Callable[[], None]] = []

    def handle(self, delivery: Delivery, handle: Callable[[], object]) -> object:
        """Handle a message, now or at the end of the early time; for a handler to return. Raises
        Refuse where 1,000 wait."""
        if self.over:
            return handle()
        if len(self._waiting) >= _LIMIT:
            raise Refuse("the supervisor is starting; try again", FaultReason.OVERLOADED)

        def answer() -> None:
            if delivery.expired:
                delivery.fail(FaultReason.EXPIRED, "its deadline passed before it could be handled")
                return
            try:
                outcome = handle()
            except Refuse as refusal:
                delivery.fail(refusal.reason, str(refusal))
                return
            if outcome is not LATER:
                assert isinstance(outcome, Message)
                delivery.reply(outcome)

        self._waiting.append(answer)
        return LATER

    def end(self) -> None:
        """The actor knows now: handle what came."""
        self.over = True
        waiting, self._waiting = self._waiting, []
        for answer in waiting:
            answer()
