"""A leaf: a run process's or a client's node, with one link to the hub.

The link is watched both ways: the socket monitor sees a connection end at once, a ping after
`heartbeat` idle seconds finds one that only looks alive. A lost link ends every ask that waits on
it, and is made again, for ever, until the node is closed or the hub refuses it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import zmq

from voidbus.transport.access import ClientKeys, require_safe
from voidbus.transport.address import AddressError, parse_address
from voidbus.transport.control import Hello, Refused, Welcome, boot_identity
from voidbus.transport.envelope import ATTACHMENT_LIMIT, Envelope, FrameError, Kind
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import CodecError
from voidbus.transport.node import Node
from voidbus.transport.packing import packets
from voidbus.transport.subscription import Subscription
from voidbus.transport.topics import OnGap, OnPublication
from voidbus.transport.wire import readable, receive_frames

_monotonic = time.monotonic

# While there is no link, a HELLO is sent this often (seconds): the monitor says when a connection
# is made, but inproc has no monitor events and a hub may be slow to answer.
_HELLO_INTERVAL = 0.25


class Leaf(Node):
    """A node with one link, to the hub at `url`.

    `on_link(up)` and `on_refused(detail)` are called where it is driven, and must not block.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        topics_url: str = "",
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        token: str = "",
        generation: int = 0,
        start_time: int = 0,
        keys: ClientKeys | None = None,
        on_link: Callable[[bool], None] | None = None,
        on_refused: Callable[[str], None] | None = None,
        queue_limit: int = 10_000,
        queue_bytes: int = 64 * 1024 * 1024,
        asks_limit: int = 10_000,
        high_water: int = 10_000,
        heartbeat: float = 30.0,
    ) -> None:
        for endpoint in filter(None, (url, topics_url)):
            require_safe(endpoint, has_keys=keys is not None)
        super().__init__(
            name,
            context=context,
            queue_limit=queue_limit,
            queue_bytes=queue_bytes,
            asks_limit=asks_limit,
        )
        self._url = url
        self._topics_url = topics_url
        self._keys = keys
        self._on_link = on_link
        self._on_refused = on_refused
        self._high_water = high_water
        self._heartbeat = heartbeat
        self.generation = generation
        self._hello = Hello(
            node=name,
            instance=self.instance,
            generation=generation,
            token=token or secrets.token_hex(16),
            pid=os.getpid(),
            start_time=start_time,
            packs=True,
        )
        self._up = False
        self._was_up = threading.Event()
        self._refused = ""
        self._hub_name = ""
        self._hub_packs = False
        self._clock_offset = 0.0
        self._last_heard = _monotonic()
        self._pinged_at = 0.0
        self._is_inproc = url.startswith("inproc:")
        # inproc has no monitor to say when a connection is made: there we try.
        self._hello_at: float | None = 0.0 if self._is_inproc else None
        self._connected = self._is_inproc
        self._renew = False
        self._dealer: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._sub: zmq.Socket[bytes] | None = None
        self._loop.start()

    # -- what a user calls -----------------------------------------------------------------

    @property
    def up(self) -> bool:
        """Whether there is a link now."""
        return self._up

    @property
    def refused(self) -> str:
        """Why the hub refused this node, for good; empty where it did not."""
        return self._refused

    def wait_up(self, timeout: float) -> bool:
        """Wait for the link, or for its refusal. True where there is a link."""
        self._was_up.wait(timeout)
        return self._up

    # -- sockets ---------------------------------------------------------------------------

    def open_sockets(self) -> None:
        self._connect()

    def _connect(self) -> None:
        dealer = self._context.socket(zmq.DEALER)
        self._prepare(dealer)
        dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if not self._is_inproc:
            # inproc connects before the hub binds only without IMMEDIATE, and has no monitor.
            dealer.setsockopt(zmq.IMMEDIATE, 1)
            self._monitor = dealer.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            )
        dealer.connect(self._url)
        self._dealer = dealer
        self._loop.sockets_changed()

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, self._high_water)
        socket.setsockopt(zmq.RCVHWM, self._high_water)
        socket.setsockopt(zmq.MAXMSGSIZE, ATTACHMENT_LIMIT)
        if self._keys is not None:
            socket.curve_secretkey = self._keys.secret
            socket.curve_publickey = self._keys.public
            socket.curve_serverkey = self._keys.server

    def _disconnect(self) -> None:
        dealer, self._dealer = self._dealer, None
        if dealer is None:
            return
        if self._monitor is not None:
            dealer.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        dealer.close(linger=0)

    def close_sockets(self) -> None:
        if self._up and self._dealer is not None:
            self._send(Envelope(Kind.BYE, f"{self._hub_name}/", f"{self.name}/"))
            if self._monitor is not None:
                self._dealer.disable_monitor()
                self._monitor.close(linger=0)
                self._monitor = None
            # What was queued last leaves, unless the hub has not read it within 200 ms.
            self._dealer.close(linger=200)
            self._dealer = None
        self._disconnect()
        if self._sub is not None:
            self._sub.close(linger=0)

    def sockets(self) -> list[zmq.Socket[bytes]]:
        found = (self._dealer, self._monitor, self._sub)
        return [socket for socket in found if socket is not None]

    def _from_bus_time(self, moment: float) -> float:
        return moment - self._clock_offset

    # -- what comes in ---------------------------------------------------------------------

    def take_frames(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> int:
        if socket is self._monitor:
            self._take_event(frames)
            return 1
        envelopes = self._parse(frames)
        for envelope in envelopes:
            if socket is self._sub:
                self._publish_here(envelope)
            else:
                self._loop.take(self._take, envelope)
        return len(envelopes)

    def _take(self, envelope: Envelope) -> None:
        self._last_heard = _monotonic()
        kind = envelope.kind
        if kind is Kind.REPLY or kind is Kind.FAULT:
            self._answers.take(envelope, envelope.sender.partition("/")[0] or self._hub_name)
        elif kind is Kind.ASK or kind is Kind.TELL:
            self._take_message(envelope)
        elif kind is Kind.WELCOME:
            self._take_welcome(envelope)
        elif kind is Kind.UNKNOWN_LINK:
            self._lose_link("the hub was started again")
        elif kind is Kind.BYE:
            self._lose_link("the hub said goodbye")
        elif kind is Kind.REFUSED:
            self._take_refusal(envelope)
        elif kind is not Kind.PONG:
            self.counters["unexpected_kind"] += 1

    def _read_events(self) -> None:
        """Take what has been told of the connection: by the monitor, or by the hub's goodbye.

        inproc has no monitor; what waits there with a goodbye is taken too.
        """
        while self._monitor is not None and readable(self._monitor):
            self._take_event(receive_frames(self._monitor))
        while self._is_inproc and self._dealer is not None and readable(self._dealer):
            self.take_frames(self._dealer, receive_frames(self._dealer))

    def _take_event(self, frames: list[bytes]) -> None:
        # zmq_socket_monitor(3): the event in 16 bits and its value in 32, in native order. Reading
        # them here and not by zmq.utils.monitor saves a client the import of asyncio, 30 ms.
        (event,) = struct.unpack_from("=H", frames[0])
        if event == zmq.EVENT_DISCONNECTED:
            self._connected = False
            self._lose_link("the connection to the hub ended")
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = True
            if not self._up and not self._refused:
                self._say_hello()

    def _take_message(self, envelope: Envelope) -> None:
        try:
            address = parse_address(envelope.dest)
        except AddressError:
            self.counters["malformed"] += 1
            return
        if address.node != self.name:
            self.counters["misrouted"] += 1
        elif envelope.generation and envelope.generation != self.generation:
            self._answers.send_back(
                envelope,
                FaultReason.STALE,
                f"meant for generation {envelope.generation}; this is {self.generation}",
            )
        else:
            self._receive(envelope, address, None)

    def _take_welcome(self, envelope: Envelope) -> None:
        try:
            welcome = Welcome.from_json(envelope.body)
        except CodecError:
            self.counters["malformed"] += 1
            return
        # On one boot of one machine both clocks are the same; elsewhere the hub's is as far ahead
        # as it was when this was sent, wrong by the time it took to come.
        same_clock = welcome.boot and welcome.boot == boot_identity()
        self._clock_offset = 0.0 if same_clock else welcome.now - _monotonic()
        self._hub_name, self._hub_packs = welcome.hub, welcome.packs
        if welcome.topics_port and not self._topics_url:
            # A link by tcp is told where the topics are; the host is the one it has reached.
            self._topics_url = f"{self._url.rpartition(':')[0]}:{welcome.topics_port}"
        if not self._up:
            self._up = True
            self._hello_at = None
            self._was_up.set()
            if self._on_link is not None:
                self._loop.defer(partial(self._on_link, True))

    def _take_refusal(self, envelope: Envelope) -> None:
        with contextlib.suppress(CodecError):
            self._refused = Refused.from_json(envelope.body).detail or "refused"
        self._refused = self._refused or "refused"
        self._lose_link(f"the hub refused this node: {self._refused}")
        self._hello_at = None
        self._was_up.set()
        if self._on_refused is not None:
            self._loop.defer(partial(self._on_refused, self._refused))

    # -- what goes out ---------------------------------------------------------------------

    def transmit(self, envelopes: Sequence[Envelope]) -> None:
        for envelope in envelopes:
            if envelope.kind is Kind.PUBLISH:
                self._publish_here(envelope)
            # Deadlines travel in the hub's time.
            elif envelope.deadline and envelope.kind in (Kind.ASK, Kind.TELL):
                envelope.deadline += self._clock_offset
        for frames, sent in packets(
            envelopes, packed=self._hub_packs, on_refused=self._answers.too_large
        ):
            if self._up:
                fault = self._send_frames(frames)
            else:
                fault = FaultReason.LINK_LOST, self._refused or "there is no link to the hub"
            if fault is not None:
                for envelope in sent:
                    self._answers.not_sent(envelope, *fault)

    def _send(self, envelope: Envelope) -> tuple[FaultReason, str] | None:
        try:
            frames = envelope.frames()
        except FrameError as error:
            return FaultReason.TOO_LARGE, str(error)
        return self._send_frames(frames)

    def _send_frames(self, frames: Sequence[bytes]) -> tuple[FaultReason, str] | None:
        if self._dealer is None:
            return FaultReason.LINK_LOST, "there is no link to the hub"
        try:
            self._loop.send(self._dealer, frames)
        except zmq.Again:
            # Full, or without a connection: then its end has been told already.
            was_up = self._up
            self._read_events()
            if was_up and not self._up:
                return FaultReason.LINK_LOST, "the connection to the hub ended"
            self.counters["link_full"] += 1
            return FaultReason.OVERLOADED, "the link to the hub is full"
        return None

    def _say_hello(self) -> None:
        self._hello_at = _monotonic() + _HELLO_INTERVAL
        self._loop.timers_changed()
        if self._dealer is not None:
            # A send looks for new connections at most once a millisecond (libzmq's
            # max_command_delay), this always does: the one just announced may be that new.
            self._dealer.getsockopt(zmq.EVENTS)
        self._send(
            Envelope(
                Kind.HELLO,
                "hub/",
                f"{self.name}/",
                tag=Hello.tag,
                version=Hello.version,
                body=self._hello.to_json(),
            )
        )

    def _lose_link(self, detail: str) -> None:
        was_up, self._up = self._up, False
        if not self._refused:
            self._was_up.clear()
            self._hello_at = _monotonic() if self._connected else None
            self._loop.timers_changed()
            self._renew = self._is_inproc
        if was_up:
            self.counters["links_lost"] += 1
            for ask in self._asks.take_nodes(lambda node: node != self.name):
                self._answers.fail(ask, FaultReason.LINK_LOST, detail)
            if self._on_link is not None:
                self._loop.defer(partial(self._on_link, False))

    # -- timers ----------------------------------------------------------------------------

    def _timer_at(self) -> float | None:
        if self._refused:
            return None
        if not self._up:
            return self._hello_at
        # The next moment at which there is something to do about a quiet link.
        return max(self._last_heard, self._pinged_at) + self._heartbeat

    def _on_timer(self, now: float) -> None:
        if self._refused:
            return
        if not self._up:
            if self._hello_at is not None and now >= self._hello_at:
                if self._renew:  # inproc doesn't connect again by itself
                    self._disconnect()
                    self._connect()
                self._say_hello()
            return
        quiet = now - self._last_heard
        if quiet >= 2.5 * self._heartbeat:
            self.counters["silent_links"] += 1
            self._connected = self._is_inproc
            self._lose_link("the hub fell silent")
            self._disconnect()
            self._connect()
            self._last_heard = now
        elif quiet >= self._heartbeat and now - self._pinged_at >= self._heartbeat:
            self._pinged_at = now
            self._send(Envelope(Kind.PING, f"{self._hub_name}/", f"{self.name}/"))

    # -- subscriptions ---------------------------------------------------------------------

    def subscribe(
        self, prefix: str, on_publication: OnPublication, on_gap: OnGap | None = None
    ) -> Subscription:
        """As Node.subscribe. Raises AddressError where the leaf was given no `topics_url`."""
        if not self._topics_url:
            raise AddressError(f"node {self.name} has no topics endpoint; give it topics_url")
        return super().subscribe(prefix, on_publication, on_gap)

    def _add_subscription(self, subscription: Subscription) -> None:
        if self._sub is None:
            self._sub = self._context.socket(zmq.SUB)
            self._prepare(self._sub)
            self._sub.setsockopt(zmq.RECONNECT_IVL, 50)
            self._sub.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
            self._sub.connect(self._topics_url)
            self._loop.sockets_changed()
        self._subscriptions.append(subscription)
        self._sub.setsockopt(zmq.SUBSCRIBE, subscription.prefix.encode())

    def _remove_subscription(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
            if self._sub is not None:
                self._sub.setsockopt(zmq.UNSUBSCRIBE, subscription.prefix.encode())
