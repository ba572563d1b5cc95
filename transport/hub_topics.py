"""What a hub publishes, and the marks that tell a new subscriber which numbers it has missed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import zmq

from voidbus.transport.control import Subscribed
from voidbus.transport.envelope import Envelope, FrameError, Kind
from voidbus.transport.hub_sockets import HubSockets
from voidbus.transport.socket_loop import SocketLoop
from voidbus.transport.topics import PREFIX_LIMIT, TopicSequencer


class HubTopics:
    """Used by the thread that drives the hub. `publish_here` serves its own subscriptions."""

    def __init__(
        self,
        name: str,
        instance: int,
        sockets: HubSockets,
        loop: SocketLoop,
        counters: Counter[str],
        publish_here: Callable[[Envelope], None],
    ) -> None:
        self._name = name
        self._instance = instance
        self._sockets = sockets
        self._loop = loop
        self._counters = counters
        self._publish_here = publish_here
        self._sent = TopicSequencer()

    def publish(self, envelope: Envelope) -> None:
        """Send a publication of the hub's own."""
        self._sent.note(envelope.dest, envelope.sequence)
        self.send(envelope)

    def send(self, envelope: Envelope) -> None:
        """Send a publication, whoever's it is."""
        self._publish_here(envelope)
        for xpub in self._sockets.topics:
            try:
                self._loop.send(xpub, envelope.frames())
            except (zmq.Again, FrameError):
                self._counters["publications_dropped"] += 1

    def retire(self, topic: str) -> None:
        """Forget a topic nothing more is published on."""
        self._sent.retire(topic)

    def take_subscription(self, frames: list[bytes]) -> None:
        """A subscription begins or ends: zmq_socket(3), ZMQ_XPUB."""
        frame = frames[0]
        if len(frames) > 1 or frame[:1] not in (b"\x00", b"\x01") or len(frame) > 1 + PREFIX_LIMIT:
            self._counters["malformed"] += 1
            return
        if frame[:1] == b"\x00":  # one that ends
            return
        prefix = frame[1:].decode(errors="replace")
        # What has left, not what was numbered: a mark must not overtake what is still queued.
        for topic, last in self._sent.matching(prefix):
            self.send(self.mark(topic, last))
        # Last: whoever sees it publishes, and a mark read after that would hide what was lost.
        self.send(self.mark(prefix, 0))

    def mark(self, topic: str, last: int) -> Envelope:
        """A publication of no content that says what the last number was."""
        return Envelope(
            *(Kind.MARK, topic, f"{self._name}/"),
            origin=self._instance,
            sequence=last,
            tag=Subscribed.tag,
        )
