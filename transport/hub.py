"""The hub: the supervisor's node. It delivers to its own actors and forwards between nodes.

A ROUTER for each right, so what a link may do is decided by the socket it came in by, and an XPUB
for topics. Leaves name themselves with a HELLO; on the work endpoint it must bear the token that
`expect` was told of.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import zmq
from zmq.auth.thread import ThreadAuthenticator

from voidbus.transport.access import Endpoints
from voidbus.transport.admission import Admission, ExpectedNode
from voidbus.transport.control import Hello, Refused, Subscribed, Welcome, boot_identity
from voidbus.transport.delivery import DeadlineWheel
from voidbus.transport.envelope import (
    ATTACHMENT_LIMIT,
    Envelope,
    FrameError,
    Kind,
    destination,
)
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import CodecError, Message, Right, UnknownType, message_type
from voidbus.transport.node import Node, Subscription
from voidbus.transport.topics import TopicSequencer

# Links a hub keeps at once, and asks it forwards at once.
LINKS_LIMIT = 8192
FORWARDS_LIMIT = 65536

# How long after a connection ended the links are probed (seconds): the monitor's event may come
# before the ROUTER has taken the peer out of its table.
_PROBE_DELAY = 0.02
# The longest prefix one may subscribe to (bytes).
_PREFIX_LIMIT = 1024

_monotonic = time.monotonic


class _Link:
    """A connected leaf: the socket and routing identity that reach it."""

    __slots__ = ("hello", "identity", "last_heard", "node", "right", "socket")

    def __init__(
        self, socket: zmq.Socket[bytes], identity: bytes, right: Right, hello: Hello, now: float
    ) -> None:
        self.socket = socket
        self.identity = identity
        self.right = right
        self.hello = hello
        self.node = hello.node
        self.last_heard = now


@dataclass(frozen=True, slots=True)
class _Forwarded:
    """An ask or tell passed on to another node: who sent it, to whom, until when."""

    number: int
    kind: Kind
    origin_node: str
    target_node: str
    deadline: float


class Hub(Node):
    """The node in the middle. `on_join(hello)` and `on_leave(node)` run on its thread.

    With `hold_work`, nodes on the work endpoint that are not expected get no answer until
    `open_work`: whom to expect is yet to be read, and a refusal would be for good.
    """

    def __init__(
        self,
        name: str,
        endpoints: Endpoints,
        *,
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
        self._admission = Admission(name, self.instance, is_open=not hold_work)
        self._sent = TopicSequencer()
        self.topics_address = ""
        self._on_join = on_join
        self._on_leave = on_leave
        self._high_water = high_water
        self._link_timeout = link_timeout
        self._rights: dict[zmq.Socket[bytes], Right] = {}
        self._monitors: dict[zmq.Socket[bytes], zmq.Socket[bytes]] = {}
        self._probe_at: float | None = None
        self._links: dict[str, _Link] = {}
        self._by_identity: dict[tuple[zmq.Socket[bytes], bytes], _Link] = {}
        self._forwards: dict[tuple[int, int], _Forwarded] = {}
        self._forward_numbers: dict[int, tuple[int, int]] = {}
        self._forward_wheel = DeadlineWheel()
        self._next_forward = 0
        self._sweep_at: float | None = None
        self._authenticator: ThreadAuthenticator | None = None
        self._xpub: zmq.Socket[bytes] = self._context.socket(zmq.XPUB)
        self._opened = threading.Event()
        try:
            self._bind()
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

    def _bind(self) -> None:
        keys = self.endpoints.keys
        if keys is not None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
            for right, folder in keys.clients.items():
                self._authenticator.configure_curve(domain=right.name, location=str(folder))
        for right, url in self.endpoints.rights.items():
            router = self._context.socket(zmq.ROUTER)
            self._rights[router] = right
            router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._prepare(router, right)
            if not url.startswith("inproc:"):  # which has no monitor
                self._monitors[router.get_monitor_socket(zmq.EVENT_DISCONNECTED)] = router
            self.addresses[right] = self._bind_socket(router, url)
        self._xpub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._prepare(self._xpub, Right.OBSERVE)
        self.topics_address = self._bind_socket(self._xpub, self.endpoints.topics)

    def _prepare(self, socket: zmq.Socket[bytes], right: Right) -> None:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, self._high_water)
        socket.setsockopt(zmq.RCVHWM, self._high_water)
        socket.setsockopt(zmq.MAXMSGSIZE, ATTACHMENT_LIMIT)
        keys = self.endpoints.keys
        if keys is not None:
            socket.curve_secretkey = keys.secret
            socket.curve_publickey = keys.public
            socket.curve_server = True
            socket.zap_domain = right.name.encode()

    @staticmethod
    def _bind_socket(socket: zmq.Socket[bytes], url: str) -> str:
        socket.bind(url)
        bound = socket.getsockopt(zmq.LAST_ENDPOINT)
        return bound.rstrip(b"\0").decode() if isinstance(bound, bytes) else url

    def open_sockets(self) -> None:
        self._opened.set()

    def close_sockets(self) -> None:
        for link in list(self._links.values()):
            self._send(link, Envelope(Kind.BYE, f"{link.node}/", f"{self.name}/"))
        for monitor, router in self._monitors.items():
            router.disable_monitor()
            monitor.close(linger=0)
        for router, right in self._rights.items():
            if self.addresses.get(right, "").startswith("inproc:"):
                router.unbind(self.addresses[right])  # closing frees the name only some time later
            router.close(linger=100)  # the BYEs leave; a peer that doesn't read them can't hold us
        self._xpub.close(linger=0)
        if self._authenticator is not None:
            self._authenticator.stop()

    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [*self._rights, *self._monitors, self._xpub]

    def _from_bus_time(self, moment: float) -> float:
        return moment

    # -- what comes in ---------------------------------------------------------------------

    def take_frames(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> None:
        if socket is self._xpub:
            self._take_subscription(frames[0])
            return
        if socket in self._monitors:
            self._probe_at = self._probe_at or _monotonic() + _PROBE_DELAY
            return
        identity = frames[0]
        envelope = self._parse(frames[1:])
        if envelope is None:
            return
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

    def _greet(self, socket: zmq.Socket[bytes], identity: bytes, envelope: Envelope) -> None:
        """An unknown link: it must say who it is before anything else."""
        if envelope.kind is not Kind.HELLO:
            self.counters["unknown_link"] += 1
            if envelope.kind is not Kind.BYE:
                self._send_raw(socket, identity, Envelope(Kind.UNKNOWN_LINK, "x/", f"{self.name}/"))
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
        right = self._rights[socket]
        refusal = self._refusal(hello, right)
        if refusal is not None and right is Right.WORK and not self._admission.is_open:
            # Whom to expect is still being read; it says hello again in a moment.
            self.counters["early_hellos"] += 1
            return
        if refusal is not None:
            self.counters["unauthorised"] += 1
            refused = Refused(detail=refusal)
            self._send_raw(socket, identity, _control(Kind.REFUSED, hello.node, self.name, refused))
            return
        old = self._links.get(hello.node)
        if old is not None:
            self._by_identity.pop((old.socket, old.identity), None)
            if old.hello.instance != hello.instance:
                self._drop(hello.node, FaultReason.LINK_LOST, "the node was started again")
        now = _monotonic()
        link = _Link(socket, identity, right, hello, now)
        self._links[hello.node] = link
        self._by_identity[socket, identity] = link
        if self._sweep_at is None:
            self._sweep_at = now + self._link_timeout / 2
        welcome = Welcome(hub=self.name, instance=self.instance, now=now, boot=boot_identity())
        new = old is None or old.hello.instance != hello.instance
        if new and self._on_join is not None:
            self._loop.defer(partial(self._on_join, hello))
        self._send(link, _control(Kind.WELCOME, hello.node, self.name, welcome))

    def _refusal(self, hello: Hello, right: Right) -> str | None:
        present = self._links.get(hello.node)
        if present is None and len(self._links) >= LINKS_LIMIT:
            return f"{LINKS_LIMIT} nodes are connected already"
        return self._admission.refusal(hello, right, present.hello if present else None)

    def _take_message(self, link: _Link, envelope: Envelope) -> None:
        """An ASK or TELL: deliver here, forward, or refuse."""
        try:
            address = destination(envelope)
        except FrameError:
            self.counters["malformed"] += 1
            return
        if not self._is_from(link, envelope) or envelope.origin != link.hello.instance:
            self.counters["forged_sender"] += 1
            return
        refusal = self._message_refusal(link, address.node, envelope)
        if refusal is not None:
            self.counters["unauthorised"] += 1
            self._return(envelope, FaultReason.REFUSED, refusal)
        elif address.node == self.name:
            self._receive(envelope, address, link.right)
        else:
            self._forward(link, address.node, envelope)

    @staticmethod
    def _is_from(link: _Link, envelope: Envelope) -> bool:
        return envelope.sender.partition("/")[0] == link.node

    def _message_refusal(self, link: _Link, target: str, envelope: Envelope) -> str | None:
        if link.right is Right.WORK and target not in (self.name, link.node):
            return "a run's node may address only the supervisor and itself"
        try:
            needed = message_type(envelope.tag, envelope.version).right
        except UnknownType:
            return None  # the receiver says so, and in better words
        if needed is None:
            return f"{envelope.tag} is sent inside a process only"
        if not link.right.allows(needed):
            return (
                f"{envelope.tag} needs the {needed.name.lower()} endpoint; "
                f"this link came by {link.right.name.lower()}"
            )
        return None

    def _forward(self, link: _Link, target: str, envelope: Envelope) -> None:
        found = self._links.get(target)
        if found is None:
            self._return(envelope, FaultReason.NO_SUCH_NODE, f"no node {target} is connected")
            return
        try:
            message_type(envelope.tag, envelope.version)
        except UnknownType as error:
            # Its right is not known here, and the node it is for would not ask for one.
            self._return(envelope, FaultReason.UNHANDLED, str(error))
            return
        identity = (envelope.origin, envelope.sequence)
        if identity in self._forwards:
            self.counters["replayed"] += 1
            return
        is_ask = envelope.kind is Kind.ASK
        if is_ask and len(self._forwards) >= FORWARDS_LIMIT:
            self._return(envelope, FaultReason.OVERLOADED, "the hub forwards too many asks")
            return
        # A tell is noted so that it can come back, while that takes no room from asks.
        if is_ask or len(self._forwards) < FORWARDS_LIMIT // 2:
            self._note_forward(identity, link.node, target, envelope)
        fault = self._send(found, envelope)
        # Where the link was dropped on the way, an ask has been answered already.
        if fault is not None and (self._end_forward(identity) is not None or not is_ask):
            self._return(envelope, *fault)

    def _note_forward(
        self, identity: tuple[int, int], origin: str, target: str, envelope: Envelope
    ) -> None:
        self._next_forward += 1
        number = self._next_forward
        self._forwards[identity] = _Forwarded(
            number, envelope.kind, origin, target, envelope.deadline
        )
        self._forward_numbers[number] = identity
        self._forward_wheel.add(number, envelope.deadline)

    def _end_forward(self, identity: tuple[int, int]) -> _Forwarded | None:
        forwarded = self._forwards.pop(identity, None)
        if forwarded is not None:
            del self._forward_numbers[forwarded.number]
            self._forward_wheel.discard(forwarded.number, forwarded.deadline)
        return forwarded

    def _take_reply(self, link: _Link, envelope: Envelope) -> None:
        """A REPLY or FAULT: only from the node that was asked, only to the one that asked."""
        if not self._is_from(link, envelope):
            self.counters["forged_sender"] += 1
            return
        if envelope.origin == self.instance:
            self._take_answer(envelope, link.node)
            return
        identity = (envelope.origin, envelope.sequence)
        forwarded = self._forwards.get(identity)
        if forwarded is None or forwarded.target_node != link.node:
            self.counters["late_replies"] += 1
            return
        if forwarded.kind is Kind.TELL and envelope.kind is not Kind.FAULT:
            self.counters["late_replies"] += 1
            return
        self._end_forward(identity)
        origin = self._links.get(forwarded.origin_node)
        if origin is None or self._send(origin, envelope) is not None:
            self.counters["replies_dropped"] += 1

    def _take_publication(self, link: _Link, envelope: Envelope) -> None:
        if link.right is not Right.WORK or not envelope.dest.startswith(f"{link.node}/"):
            self.counters["unauthorised"] += 1
            return
        self._send_topic(envelope)

    def retire_topic(self, topic: str) -> None:
        super().retire_topic(topic)
        self._loop.call(lambda: self._sent.retire(topic))

    def _take_subscription(self, frame: bytes) -> None:
        if frame[:1] != b"\x01":
            return
        if len(frame) > _PREFIX_LIMIT:
            self.counters["malformed"] += 1
            return
        prefix = frame[1:].decode(errors="replace")
        # What has left, not what was numbered: a mark must not overtake what is still queued.
        for topic, last in self._sent.matching(prefix):
            self._send_topic(_mark(topic, self.name, self.instance, last))
        # Last: whoever sees it publishes, and a mark read after that would hide what was lost.
        self._send_topic(_mark(prefix, self.name, self.instance, 0))

    # -- what goes out ---------------------------------------------------------------------

    def transmit(self, envelope: Envelope) -> None:
        if envelope.kind is Kind.PUBLISH:
            self._sent.note(envelope.dest, envelope.sequence)
            self._send_topic(envelope)
            return
        node = envelope.dest.partition("/")[0]
        if node == self.name:
            self._take_answer(envelope, self.name)
            return
        link = self._links.get(node)
        if link is None:
            fault: tuple[FaultReason, str] | None = (
                FaultReason.NO_SUCH_NODE,
                f"no node {node} is connected",
            )
        else:
            fault = self._send(link, envelope)
        if fault is None:
            return
        if envelope.kind is Kind.ASK:
            ask = self._asks.take(envelope.sequence)
            if ask is not None:
                self._fail_ask(ask, *fault)
        elif envelope.kind is Kind.TELL:
            self.counters[f"fault_{fault[0].value}"] += 1
            self._take_returned_tell(
                Envelope(Kind.FAULT, envelope.sender, envelope.dest, origin=envelope.origin),
                Fault(reason=fault[0], detail=fault[1], address=envelope.dest),
            )
        else:
            self.counters["replies_dropped"] += 1

    def _send(self, link: _Link, envelope: Envelope) -> tuple[FaultReason, str] | None:
        fault = self._send_raw(link.socket, link.identity, envelope)
        if fault is not None and fault[0] is FaultReason.NO_SUCH_NODE:
            self._drop(link.node, FaultReason.LINK_LOST, "the node's connection ended")
        return fault

    def _send_raw(
        self, socket: zmq.Socket[bytes], identity: bytes, envelope: Envelope
    ) -> tuple[FaultReason, str] | None:
        try:
            self._loop.send(socket, [identity, *envelope.frames()])
        except zmq.Again:
            self.counters["link_full"] += 1
            return FaultReason.OVERLOADED, "the link to the node is full"
        except FrameError as error:
            return FaultReason.TOO_LARGE, str(error)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return FaultReason.NO_SUCH_NODE, "the node's connection has ended"
        return None

    def _send_topic(self, envelope: Envelope) -> None:
        self._publish_here(envelope)
        try:
            self._loop.send(self._xpub, envelope.frames())
        except (zmq.Again, FrameError):
            self.counters["publications_dropped"] += 1

    # -- links that end --------------------------------------------------------------------

    def _drop(self, node: str, reason: FaultReason, detail: str) -> None:
        link = self._links.pop(node, None)
        if link is not None:
            self._by_identity.pop((link.socket, link.identity), None)
        for ask in self._asks.take_nodes(lambda name: name == node):
            self._fail_ask(ask, reason, detail)
        for identity in [i for i, f in self._forwards.items() if f.target_node == node]:
            forwarded = self._end_forward(identity)
            if forwarded is not None and forwarded.kind is Kind.ASK:
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
        self, identity: tuple[int, int], forwarded: _Forwarded, reason: FaultReason, detail: str
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
        timers = (self._sweep_at, self._probe_at, self._forward_wheel.next_at())
        moments = [moment for moment in timers if moment is not None]
        return min(moments) if moments else None

    def _on_timer(self, now: float) -> None:
        for number in self._forward_wheel.due(now):
            identity = self._forward_numbers.pop(number)
            self._forwards.pop(identity, None)  # the asker ends it by its own deadline
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
        subscription.take(_mark(subscription.prefix, self.name, self.instance, 0))

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


def _mark(topic: str, hub: str, epoch: int, last: int) -> Envelope:
    """A publication of no content that says what the last number was."""
    return Envelope(Kind.MARK, topic, f"{hub}/", origin=epoch, sequence=last, tag=Subscribed.tag)
