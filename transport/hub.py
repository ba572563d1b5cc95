"""The hub: the supervisor's node. It delivers to its own actors and forwards between nodes.

A ROUTER for each right, so what a link may do is decided by the socket it came in by, and an XPUB
for topics. Leaves name themselves with a HELLO; on the work endpoint it must bear the token that
`expect` was told of.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import zmq

from voidbus.transport.access import Endpoints
from voidbus.transport.admission import Admission, ExpectedNode, message_refusal
from voidbus.transport.control import Hello, Refused, Welcome, boot_identity
from voidbus.transport.envelope import Envelope, FrameError, Kind, destination
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.forwarding import Forwarded, Forwards, Identity
from voidbus.transport.hub_sockets import HubSockets
from voidbus.transport.hub_topics import HubTopics
from voidbus.transport.link import Link
from voidbus.transport.message import CodecError, Message, Right, UnknownType, message_type
from voidbus.transport.node import Node
from voidbus.transport.packing import packets
from voidbus.transport.replay import EndedSessions
from voidbus.transport.subscription import Subscription

# Links a hub keeps at once.
LINKS_LIMIT = 8192

# How long after a connection ended the links are probed (seconds): the monitor's event may come
# before the ROUTER has taken the peer out of its table.
_PROBE_DELAY = 0.02
_monotonic = time.monotonic


class Hub(Node):
    """The node in the middle. `on_join(hello)` and `on_leave(node)` are called where it is driven.

    With `hold_work`, nodes on the work endpoint that are not expected get no answer until
    `open_work`: whom to expect is yet to be read, and a refusal would be for good. `remote` are
    endpoints beside the others, for other machines.
    """

    def __init__(
        self,
        name: str,
        endpoints: Endpoints,
        *,
        remote: Endpoints | None = None,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        on_join: Callable[[Hello], None] | None = None,
        on_leave: Callable[[str], None] | None = None,
        queue_limit: int = 100_000,
        queue_bytes: int = 256 * 1024 * 1024,
        asks_limit: int = 100_000,
        high_water: int = 10_000,
        link_timeout: float = 90.0,
        hold_work: bool = False,
    ) -> None:
        super().__init__(
            name,
            context=context,
            queue_limit=queue_limit,
            queue_bytes=queue_bytes,
            asks_limit=asks_limit,
        )
        self.endpoints = endpoints
        self.addresses: dict[Right, str] = {}
        self.topics_address = ""
        self.remote: Endpoints | None = None
        self._remote_routers: frozenset[zmq.Socket[bytes]] = frozenset()
        self._admission = Admission(name, self.instance, is_open=not hold_work)
        self._on_join = on_join
        self._on_leave = on_leave
        self._link_timeout = link_timeout
        self._probe_at: float | None = None
        self._links: dict[str, Link] = {}
        self._by_identity: dict[tuple[zmq.Socket[bytes], bytes], Link] = {}
        self._ended = EndedSessions()
        self._forwards = Forwards()
        self._sweep_at: float | None = None
        self._sockets = HubSockets(self._context, high_water)
        self._topics = HubTopics(
            *(name, self.instance, self._sockets),
            *(self._loop, self.counters, self._publish_here),
        )
        try:
            self._bind(endpoints, remote)
        except BaseException:
            self.close_sockets()
            super().close()
            raise
        self._loop.start()

    # -- what the supervisor calls ---------------------------------------------------------

    def expect(self, node: str, digest: bytes, generation: int) -> None:
        """Let `node` join by the work endpoint, from now on only with this generation."""
        self._admission.expected[node] = ExpectedNode(digest, generation)
        self._loop.call(lambda: self._fence(node, generation))

    def open_work(self) -> None:
        """All nodes that may come are expected now; others are refused, for good."""
        self._admission.is_open = True

    def dismiss(self, node: str) -> None:
        """No longer let `node` in; asks that wait for it end now with `link_lost`."""
        self._admission.expected.pop(node, None)
        self._loop.call(lambda: self._drop(node, FaultReason.LINK_LOST, "the node was dismissed"))

    def joined(self, node: str) -> bool:
        """Whether `node` has a link now."""
        return node in self._links

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes that have a link now."""
        return sorted(self._links)

    # -- sockets ---------------------------------------------------------------------------

    def _bind(self, endpoints: Endpoints, remote: Endpoints | None) -> None:
        bound = self._sockets.bind(endpoints)
        self.addresses, self.topics_address = bound.rights, bound.topics
        if remote is not None:
            local = frozenset(self._sockets.rights)
            self.remote = self._sockets.bind(remote)
            self._remote_routers = frozenset(self._sockets.rights) - local

    def open_sockets(self) -> None:
        """They were bound when the hub was made, so that what can't be bound is said there."""

    def close_sockets(self) -> None:
        for link in list(self._links.values()):
            self._send(link, Envelope(Kind.BYE, f"{link.node}/", f"{self.name}/"))
        self._sockets.close()

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return self._sockets.all()

    def _from_bus_time(self, moment: float) -> float:
        return moment

    # -- what comes in ---------------------------------------------------------------------

    def take_frames(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> int:
        if socket not in self._sockets.rights:
            self._take_other(socket, frames)
            return 1
        identity = frames.pop(0)
        envelopes = self._parse(frames)
        for envelope in envelopes:
            self._loop.take(self._take, socket, identity, envelope)
        return len(envelopes)

    def _take(self, socket: zmq.Socket[bytes], identity: bytes, envelope: Envelope) -> None:
        link = self._by_identity.get((socket, identity))
        if link is None:
            self._greet(socket, identity, envelope)
            return
        link.last_heard = _monotonic()
        kind = envelope.kind
        if kind is Kind.ASK or kind is Kind.TELL:
            self._take_message(link, envelope)
        elif kind is Kind.REPLY or kind is Kind.FAULT:
            self._take_reply(link, envelope)
        elif kind is Kind.PING:
            self._send(link, Envelope(Kind.PONG, f"{link.node}/", f"{self.name}/"))
        elif kind is Kind.PUBLISH:
            self._take_publication(link, envelope)
        elif kind is Kind.HELLO:
            self._greet(socket, identity, envelope)
        elif kind is Kind.BYE:
            self._drop(link.node, FaultReason.LINK_LOST, "the node said goodbye")
        else:
            self.counters["unexpected_kind"] += 1

    def _take_other(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        if socket in self._sockets.topics:
            self._topics.take_subscription(frames)
        else:  # a monitor: a connection has ended
            self._probe_at = self._probe_at or _monotonic() + _PROBE_DELAY
            self._loop.timers_changed()

    def _greet(self, socket: zmq.Socket[bytes], identity: bytes, envelope: Envelope) -> None:
        """An unknown link: it must say who it is before anything else."""
        if envelope.kind is not Kind.HELLO:
            self.counters["unknown_link"] += 1
            if envelope.kind is not Kind.BYE:
                unknown = Envelope(Kind.UNKNOWN_LINK, "x/", f"{self.name}/")
                self._send_raw(socket, identity, unknown.frames())
            return
        try:
            hello = Hello.from_json(envelope.body)
        except CodecError:
            self.counters["malformed"] += 1
            return
        known = self._by_identity.get((socket, identity))
        if known is not None and known.node != hello.node:
            self.counters["unauthorised"] += 1  # one connection has one name
            return
        right = self._sockets.rights[socket]
        refusal = self._refusal(hello, right)
        if refusal is not None and right is Right.WORK and not self._admission.is_open:
            # Whom to expect is still being read; it says hello again in a moment.
            self.counters["early_hellos"] += 1
            return
        if refusal is not None:
            self.counters["unauthorised"] += 1
            refused = Refused(detail=refusal)
            answer = _control(Kind.REFUSED, hello.node, self.name, refused)
            self._send_raw(socket, identity, answer.frames())
            return
        old = self._links.get(hello.node)
        if old is not None:
            self._by_identity.pop((old.socket, old.identity), None)
            if old.hello.instance != hello.instance:
                self._drop(hello.node, FaultReason.LINK_LOST, "the node was started again")
                old = None
        now = _monotonic()
        window = old.window if old else self._ended.resume(hello.node, hello.instance)
        link = Link(socket, identity, right, hello, window, now)
        self._links[hello.node] = link
        self._by_identity[socket, identity] = link
        if self._sweep_at is None:
            self._sweep_at = now + self._link_timeout / 2
            self._loop.timers_changed()
        welcome = Welcome(
            hub=self.name,
            instance=self.instance,
            now=now,
            boot=boot_identity(),
            topics_port=self._topics_port(socket),
            packs=True,
        )
        if old is None and self._on_join is not None:
            self._loop.defer(partial(self._on_join, hello))
        self._send(link, _control(Kind.WELCOME, hello.node, self.name, welcome))

    def _topics_port(self, socket: zmq.Socket[bytes]) -> int:
        """Where, on this host, a link by `socket` finds the topics; 0 for one that was told."""
        if self.remote is None or socket not in self._remote_routers:
            return 0
        return int(self.remote.topics.rpartition(":")[2] or 0)

    def _refusal(self, hello: Hello, right: Right) -> str | None:
        present = self._links.get(hello.node)
        if present is None and len(self._links) >= LINKS_LIMIT:
            return f"{LINKS_LIMIT} nodes are connected already"
        return self._admission.refusal(hello, right, present.hello if present else None)

    def _take_message(self, link: Link, envelope: Envelope) -> None:
        """An ASK or TELL: deliver here, forward, or refuse."""
        try:
            address = destination(envelope)
        except FrameError:
            self.counters["malformed"] += 1
            return
        if not self._is_from(link, envelope) or envelope.origin != link.hello.instance:
            self.counters["forged_sender"] += 1
            return
        if not link.window.take(envelope.sequence):
            self.counters["replayed"] += 1
            return
        refusal = message_refusal(envelope, address.node, link, self.name)
        if refusal is not None:
            self.counters["unauthorised"] += 1
            self._answers.send_back(envelope, FaultReason.REFUSED, refusal)
        elif address.node == self.name:
            self._receive(envelope, address, link.right)
        else:
            self._forward(link, address.node, envelope)

    @staticmethod
    def _is_from(link: Link, envelope: Envelope) -> bool:
        return envelope.sender.partition("/")[0] == link.node

    def _forward(self, link: Link, target: str, envelope: Envelope) -> None:
        found = self._links.get(target)
        if found is None:
            self._answers.send_back(
                envelope, FaultReason.NO_SUCH_NODE, f"no node {target} is connected"
            )
            return
        try:
            message_type(envelope.tag, envelope.version)
        except UnknownType as error:
            # Its right is not known here, and the node it is for would not ask for one.
            self._answers.send_back(envelope, FaultReason.UNHANDLED, str(error))
            return
        identity = (envelope.origin, envelope.sequence)
        if identity in self._forwards:
            self.counters["replayed"] += 1
            return
        if not self._forwards.note(envelope, link.node, target):
            self._answers.send_back(
                envelope, FaultReason.OVERLOADED, "the hub forwards too many asks"
            )
            return
        self._loop.timers_changed()
        fault = self._send(found, envelope)
        # Where the link was dropped on the way, an ask has been answered already.
        ended = fault and self._forwards.end(identity)
        if fault is not None and (ended is not None or envelope.kind is not Kind.ASK):
            self._answers.send_back(envelope, *fault)

    def _take_reply(self, link: Link, envelope: Envelope) -> None:
        """A REPLY or FAULT: only from the node that was asked, only to the one that asked."""
        if not self._is_from(link, envelope):
            self.counters["forged_sender"] += 1
            return
        if envelope.origin == self.instance:
            self._answers.take(envelope, link.node)
            return
        identity = (envelope.origin, envelope.sequence)
        forwarded = self._forwards.get(identity)
        if forwarded is None or forwarded.target_node != link.node:
            self.counters["late_replies"] += 1
            return
        if forwarded.kind is Kind.TELL and envelope.kind is not Kind.FAULT:
            self.counters["late_replies"] += 1
            return
        self._forwards.end(identity)
        origin = self._links.get(forwarded.origin_node)
        if origin is None or self._send(origin, envelope) is not None:
            self.counters["replies_dropped"] += 1

    def _take_publication(self, link: Link, envelope: Envelope) -> None:
        if link.right is not Right.WORK or not envelope.dest.startswith(f"{link.node}/"):
            self.counters["unauthorised"] += 1
            return
        self._topics.send(envelope)

    def retire_topic(self, topic: str) -> None:
        super().retire_topic(topic)
        self._loop.call(lambda: self._topics.retire(topic))

    # -- what goes out ---------------------------------------------------------------------

    def transmit(self, envelopes: Sequence[Envelope]) -> None:
        if len(envelopes) == 1 and envelopes[0].kind is not Kind.PUBLISH:
            self._transmit_to(envelopes[0].dest.partition("/")[0], envelopes)
            return
        by_node: dict[str, list[Envelope]] = {}
        for envelope in envelopes:
            if envelope.kind is Kind.PUBLISH:
                self._topics.publish(envelope)
            else:
                by_node.setdefault(envelope.dest.partition("/")[0], []).append(envelope)
        for node, theirs in by_node.items():
            self._transmit_to(node, theirs)

    def _transmit_to(self, node: str, envelopes: Sequence[Envelope]) -> None:
        if node == self.name:
            for envelope in envelopes:
                self._answers.take(envelope, node)
            return
        link = self._links.get(node)
        if link is None:
            for envelope in envelopes:
                self._answers.not_sent(
                    envelope, FaultReason.NO_SUCH_NODE, f"no node {node} is connected"
                )
            return
        for frames, sent in packets(
            envelopes, packed=link.hello.packs, on_refused=self._answers.too_large
        ):
            fault = self._send_frames(link, frames)
            if fault is not None:
                for envelope in sent:
                    self._answers.not_sent(envelope, *fault)

    def _send(self, link: Link, envelope: Envelope) -> tuple[FaultReason, str] | None:
        try:
            return self._send_frames(link, envelope.frames())
        except FrameError as error:
            return FaultReason.TOO_LARGE, str(error)

    def _send_frames(self, link: Link, frames: Sequence[bytes]) -> tuple[FaultReason, str] | None:
        fault = self._send_raw(link.socket, link.identity, frames)
        if fault is not None and fault[0] is FaultReason.NO_SUCH_NODE:
            self._drop(link.node, FaultReason.LINK_LOST, "the node's connection ended")
        return fault

    def _send_raw(
        self, socket: zmq.Socket[bytes], identity: bytes, frames: Sequence[bytes]
    ) -> tuple[FaultReason, str] | None:
        try:
            self._loop.send(socket, [identity, *frames])
        except zmq.Again:
            self.counters["link_full"] += 1
            return FaultReason.OVERLOADED, "the link to the node is full"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return FaultReason.NO_SUCH_NODE, "the node's connection has ended"
        return None

    # -- links that end --------------------------------------------------------------------

    def _drop(self, node: str, reason: FaultReason, detail: str) -> None:
        link = self._links.pop(node, None)
        if link is not None:
            self._by_identity.pop((link.socket, link.identity), None)
            self._ended.keep(node, link.hello.instance, link.window)
        for ask in self._asks.take_nodes(lambda name: name == node):
            self._answers.fail(ask, reason, detail)
        for identity, forwarded in self._forwards.end_to(node):
            if forwarded.kind is Kind.ASK:
                self._fail_forward(identity, forwarded, reason, detail)
        if link is not None and self._on_leave is not None:
            self._loop.defer(partial(self._on_leave, node))

    def _fence(self, node: str, generation: int) -> None:
        link = self._links.get(node)
        if link is not None and link.hello.generation != generation:
            self._drop(node, FaultReason.LINK_LOST, f"generation {generation} replaces it")

    def _probe(self) -> None:
        """A connection ended, and ROUTER doesn't say whose: a send finds the links without one."""
        for link in list(self._links.values()):
            if not link.socket.closed:
                self._send(link, Envelope(Kind.PONG, f"{link.node}/", f"{self.name}/"))

    def _fail_forward(
        self, identity: Identity, forwarded: Forwarded, reason: FaultReason, detail: str
    ) -> None:
        origin = self._links.get(forwarded.origin_node)
        if origin is None:
            return
        fault = Fault(reason=reason, detail=detail, address=f"{forwarded.target_node}/")
        # In the name of the node that was asked: the asker takes an answer from no other.
        envelope = _control(Kind.FAULT, origin.node, forwarded.target_node, fault)
        envelope.origin, envelope.sequence = identity
        self.counters[f"fault_{reason.value}"] += 1
        self._send(origin, envelope)

    def _timer_at(self) -> float | None:
        timers = (self._sweep_at, self._probe_at, self._forwards.next_at())
        moments = [moment for moment in timers if moment is not None]
        return min(moments) if moments else None

    def _on_timer(self, now: float) -> None:
        self._forwards.expire(now)
        if self._probe_at is not None and now >= self._probe_at:
            self._probe_at = None
            self._probe()
        if self._sweep_at is not None and now >= self._sweep_at:
            silent = [
                link.node
                for link in self._links.values()
                if now - link.last_heard > self._link_timeout
            ]
            for node in silent:
                self.counters["silent_links"] += 1
                self._drop(node, FaultReason.LINK_LOST, "the node fell silent")
            self._sweep_at = now + self._link_timeout / 2 if self._links else None

    # -- subscriptions inside the hub ------------------------------------------------------

    def _add_subscription(self, subscription: Subscription) -> None:
        self._subscriptions.append(subscription)
        subscription.take(self._topics.mark(subscription.prefix, 0))

    def _remove_subscription(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)


def _control(kind: Kind, node: str, hub: str, message: Message) -> Envelope:
    return Envelope(
        kind,
        f"{node}/",
        f"{hub}/",
        tag=message.tag,
        version=message.version,
        body=message.to_json(),
    )
