"""A subscription: which topics, whom to call, and the account of what was lost on each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from voidbus.transport.envelope import Envelope, Kind
from voidbus.transport.message import message_type
from voidbus.transport.topics import OnGap, OnPublication, Publication, TopicTracker, Verdict

# Topics one subscription keeps account of: a hub that invents topics must not fill our memory.
_TOPICS_LIMIT = 65536


class Subscriber(Protocol):
    """The node a subscription belongs to."""

    def guard(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call what a user gave; what it raises ends there."""

    def unsubscribe(self, subscription: Subscription) -> None:
        """Let it go."""


class Subscription:
    """A subscriber's hold on every topic that begins with `prefix`. Close it with `cancel`."""

    def __init__(
        self, node: Subscriber, prefix: str, on_publication: OnPublication, on_gap: OnGap | None
    ) -> None:
        self.prefix = prefix
        self._node = node
        self._on_publication = on_publication
        self._on_gap = on_gap
        self._trackers: dict[str, TopicTracker] = {}
        self._ready = threading.Event()

    @property
    def lost(self) -> int:
        """Publications known to be lost, over all topics."""
        return sum(tracker.lost for tracker in list(self._trackers.values()))

    def wait_ready(self, timeout: float) -> bool:
        """Wait until the publisher knows of it: from then on nothing is missed unseen."""
        return self._ready.wait(timeout)

    def cancel(self) -> None:
        self._node.unsubscribe(self)

    def take(self, envelope: Envelope) -> None:
        """Account for a publication and pass it on. For the thread that drives the node."""
        if envelope.kind is Kind.MARK and not envelope.sequence:
            # The last of the marks a subscription gets.
            if envelope.dest == self.prefix:
                self._ready.set()
            return
        topic = envelope.dest
        tracker = self._trackers.get(topic)
        if tracker is None:
            if len(self._trackers) >= _TOPICS_LIMIT:
                self._trackers.clear()
            tracker = self._trackers[topic] = TopicTracker(topic)
        mark = envelope.kind is Kind.MARK
        verdict, gap = tracker.observe(envelope.origin, envelope.sequence, mark=mark)
        if gap is not None and self._on_gap is not None:
            self._node.guard(self._on_gap, gap)
        if mark or verdict is Verdict.DUPLICATE:
            return
        message = message_type(envelope.tag, envelope.version).from_json(envelope.body)
        publication = Publication(topic, envelope.origin, envelope.sequence, message)
        self._node.guard(self._on_publication, publication)
