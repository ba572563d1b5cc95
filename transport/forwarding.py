"""Asks and tells a hub has passed on, until they are answered, fail, or nobody waits any more."""

from __future__ import annotations

from dataclasses import dataclass

from voidbus.transport.envelope import Envelope, Kind
from voidbus.transport.under_way import UnderWay

# Asks a hub forwards at once. Tells are noted, so that they can come back, while they take no more
# than half of it.
FORWARDS_LIMIT = 65536

Identity = tuple[int, int]
"""The origin and the sequence number of an envelope."""


@dataclass(frozen=True, slots=True)
class Forwarded:
    """An ask or tell passed on to another node: who sent it, to whom, until when."""

    kind: Kind
    origin_node: str
    target_node: str
    deadline: float


class Forwards:
    """What is under way between other nodes. For one thread."""

    def __init__(self) -> None:
        self._entries: UnderWay[Identity, Forwarded] = UnderWay()

    def __contains__(self, identity: Identity) -> bool:
        return identity in self._entries

    def get(self, identity: Identity) -> Forwarded | None:
        return self._entries.get(identity)

    def note(self, envelope: Envelope, origin: str, target: str) -> bool:
        """Note an ask or a tell. False for an ask where there is no room; a tell goes unnoted."""
        is_ask = envelope.kind is Kind.ASK
        if len(self._entries) >= (FORWARDS_LIMIT if is_ask else FORWARDS_LIMIT // 2):
            return not is_ask
        self._entries.add(
            (envelope.origin, envelope.sequence),
            Forwarded(envelope.kind, origin, target, envelope.deadline),
        )
        return True

    def end(self, identity: Identity) -> Forwarded | None:
        """It was answered, or failed; None where it is not under way."""
        return self._entries.take(identity)

    def end_to(self, target: str) -> list[tuple[Identity, Forwarded]]:
        """End everything that was passed on to `target`."""
        ended = [(i, f) for i, f in self._entries.items() if f.target_node == target]
        for identity, _ in ended:
            self.end(identity)
        return ended

    def next_at(self) -> float | None:
        """When `expire` will next have something to do."""
        return self._entries.next_at()

    def expire(self, now: float) -> None:
        """Forget what is past its deadline: the asker ends it by its own."""
        self._entries.take_due(now)
