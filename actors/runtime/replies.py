"""What an actor still owes its askers, and what it has told them already."""

from __future__ import annotations

from collections.abc import Sequence

from voidbus.transport.delivery import Delivery, ReplyStore
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

# Below this many open answers, expired ones are not worth sweeping out.
_SWEEP_AT_LEAST = 64


class CommandReplies(ReplyStore):
    """Stores replies only. A command that ended with a fault may be tried again.

    Repeats that came while it was under way get the fault, as the first one did.
    """

    def finish(self, key: str, reply: Message, attachments: Sequence[bytes]) -> None:
        super().finish(key, reply, attachments)
        if isinstance(reply, Fault):
            self._entries.pop(key, None)


class Unanswered:
    """Asks whose handlers will answer later: failed at once when their actor ends before.

    Those whose deadline has passed are swept out when as many more have come as there were.
    """

    def __init__(self) -> None:
        self._open: dict[int, Delivery] = {}
        self._sweep_at = _SWEEP_AT_LEAST

    def __len__(self) -> int:
        return len(self._open)

    def add(self, delivery: Delivery) -> None:
        if len(self._open) >= self._sweep_at:
            self._open = {n: waiting for n, waiting in self._open.items() if not waiting.expired}
            self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(self._open))
        number = id(delivery)
        self._open[number] = delivery

        def answered(_reply: Message, _attachments: Sequence[bytes]) -> None:
            self._open.pop(number, None)

        delivery.tap(answered)

    def fail(self, detail: str) -> None:
        """Answer all of them with a fault: their actor has ended."""
        for delivery in list(self._open.values()):
            delivery.fail(FaultReason.FAILED, detail)
