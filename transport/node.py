"""A node: one process's place on the bus. One thread owns its sockets.

`Hub` and `Leaf` are the two kinds. What they share is here: receivers, asks, tells, publications,
the outbound queue and the thread that polls.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import zmq

from voidbus.transport.address import Address, AddressError, parse_address
from voidbus.transport.answers import Answers
from voidbus.transport.delivery import Ask, Delivery, Driver, PendingAsks, Receiver
from voidbus.transport.envelope import Envelope, FrameError, Kind, read_envelope
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import CodecError, Message, Right, UnknownType, message_type
from voidbus.transport.outbound import Outbound
from voidbus.transport.packing import is_pack, unpack
from voidbus.transport.socket_loop import SocketLoop
from voidbus.transport.subscription import Subscription
from voidbus.transport.topics import PREFIX_LIMIT, OnGap, OnPublication, TopicSequencer

_monotonic = time.monotonic
_log = logging.getLogger("voidbus.transport")


class Node(ABC):
    """What actors and clients use of the bus.

    `counters` counts everything that was dropped, refused or late, by name; docs/messages.md
    lists the names.
    """

    def __init__(
        self,
        name: str,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None,
        queue_limit: int,
        queue_bytes: int,
        asks_limit: int,
    ) -> None:
        self.name = name
        self.instance = secrets.randbits(63)
        self.counters: Counter[str] = Counter()
        self._owns_context = context is None
        self._context = context or zmq.Context()
        self._receivers: dict[str, Receiver] = {}
        self._asks = PendingAsks(asks_limit)
        self._loop = SocketLoop(
            name, self, self.counters, queue_limit=queue_limit, queue_bytes=queue_bytes
        )
        self._outbound = Outbound(self._loop, self._asks)
        self._answers = Answers(
            *(self.instance, self.counters, self._receivers),
            *(self._asks, self._outbound, self._loop),
        )
        self.guard = self._loop.guard
        self.driver: Driver = self._loop
        self._close_lock = threading.Lock()
        self._sequencer = TopicSequencer()
        self._publish_lock = threading.Lock()
        self._subscriptions: list[Subscription] = []
        self._alarm: tuple[float, Callable[[], None]] | None = None

    # -- what a user of the bus calls ------------------------------------------------------

    def attach(self, path: str, receiver: Receiver) -> None:
        """Deliver what is for `path` to `receiver`. Raises ValueError where the path is taken."""
        parse_address(f"{self.name}/{path}")
        if self._receivers.setdefault(path, receiver) is not receiver:
            raise ValueError(f"{self.name}/{path} is attached already")

    def detach(self, path: str) -> None:
        self._receivers.pop(path, None)

    def ask(
        self,
        dest: Address | str,
        message: Message,
        *,
        timeout: float,
        sender: str = "",
        attachments: Sequence[bytes] = (),
        key: str = "",
        trace: str = "",
        generation: int = 0,
        on_end: Callable[[Ask], None] | None = None,
    ) -> Ask:
        """Send a question that ends within `timeout` seconds, whatever happens.

        `key` names a command so that a repeat of it is answered with the first one's reply.
        Nothing is raised for what can go wrong on the way: that is the outcome.
        """
        address = parse_address(dest) if isinstance(dest, str) else dest
        deadline = _monotonic() + timeout
        if on_end is not None:
            on_end = partial(self.guard, on_end)
        if address.node == self.name:
            ask = Ask(address.path, deadline, on_end)
            if self._loop.closing:
                self._answers.fail(ask, FaultReason.CLOSED, "this node was closed")
                return ask
            if on_end is not None:
                self._watch_deadline(ask, on_end)
            delivery = Delivery(address.path, sender, message, deadline, ask.end)
            delivery.key = key
            if attachments or trace:
                delivery.attachments, delivery.trace = attachments, trace
            self._deliver_here(delivery)
            return ask
        text = str(address)
        ask = Ask(text, deadline, on_end, driver=self._loop)
        try:
            body = message.to_json()
        except ValueError as error:
            self._answers.fail(
                ask, FaultReason.INVALID, f"{message.tag} cannot be written: {error}"
            )
            return ask
        envelope = Envelope(
            Kind.ASK,
            text,
            f"{self.name}/{sender}",
            origin=self.instance,
            tag=message.tag,
            version=message.version,
            deadline=deadline,
            generation=generation,
            key=key,
            trace=trace,
            body=body,
            attachments=attachments,
        )
        fault = self._outbound.ask(envelope, address.node, ask)
        if fault is not None:
            self._answers.fail(ask, *fault)
        return ask

    def tell(
        self,
        dest: Address | str,
        message: Message,
        *,
        timeout: float = 30.0,
        sender: str = "",
        attachments: Sequence[bytes] = (),
        trace: str = "",
        generation: int = 0,
    ) -> FaultReason | None:
        """Send a message nobody waits for. It is not handled after `timeout` seconds.

        Returns the reason where it can't even leave; what happens later comes to `sender`
        as a Fault.
        """
        address = parse_address(dest) if isinstance(dest, str) else dest
        node, path = address
        deadline = _monotonic() + timeout
        if node == self.name:
            delivery = Delivery(path, sender, message, deadline)
            if attachments or trace:
                delivery.attachments, delivery.trace = attachments, trace
            return self._deliver_here(delivery)
        try:
            body = message.to_json()
        except ValueError:
            return FaultReason.INVALID
        fault = self._outbound.tell(
            Envelope(
                Kind.TELL,
                str(address),
                f"{self.name}/{sender}",
                origin=self.instance,
                tag=message.tag,
                version=message.version,
                deadline=deadline,
                generation=generation,
                trace=trace,
                body=body,
                attachments=attachments,
            )
        )
        return fault and fault[0]

    def publish(self, topic: str, message: Message) -> int:
        """Publish to whoever subscribes. Returns the publication's number on its topic."""
        with self._publish_lock:  # numbers leave in their order
            number = self._sequencer.next(topic)
            envelope = Envelope(
                Kind.PUBLISH,
                topic,
                f"{self.name}/",
                origin=self.instance,
                sequence=number,
                tag=message.tag,
                version=message.version,
                body=message.to_json(),
            )
            if self._outbound.submit(envelope) is not None:
                self.counters["publications_dropped"] += 1
            return number

    def retire_topic(self, topic: str) -> None:
        """Forget a topic nothing more is published on."""
        with self._publish_lock:
            self._sequencer.retire(topic)

    def subscribe(
        self, prefix: str, on_publication: OnPublication, on_gap: OnGap | None = None
    ) -> Subscription:
        """Get every publication on topics that begin with `prefix`.

        `on_publication` is called by the thread that drives the node, and must be quick.

        `on_gap` is the catch-up hook: it is told which numbers were lost, to fetch them elsewhere.
        Raises AddressError for a prefix over PREFIX_LIMIT bytes.
        """
        if len(prefix.encode()) > PREFIX_LIMIT:
            raise AddressError(f"a prefix of topics has {PREFIX_LIMIT} bytes at most")
        subscription = Subscription(self, prefix, on_publication, on_gap)
        self._loop.call(lambda: self._add_subscription(subscription))
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._loop.call(lambda: self._remove_subscription(subscription))

    def wake_at(self, moment: float, run: Callable[[], None]) -> None:
        """Have the thread that drives the node call `run` at `moment` (monotonic), once.

        It must be quick.

        There is one such call: another one set before takes effect no more.
        """
        self._alarm = (moment, run)
        self._loop.timers_changed()

    def close(self, timeout: float = 5.0) -> None:
        """Send what is queued, end every ask, close the sockets, join the thread. Idempotent."""
        with self._close_lock:
            if self._loop.closed:
                return
            self._loop.close(timeout)
            if self._owns_context:
                self._context.term()
        for ask in self._asks.take_nodes(lambda _: True):
            self._answers.fail(ask, FaultReason.CLOSED, "this node was closed")

    # -- delivery inside the node ----------------------------------------------------------

    def _deliver_here(self, delivery: Delivery) -> FaultReason | None:
        receiver = self._receivers.get(delivery.path)
        if receiver is None:
            reason: FaultReason | None = FaultReason.NO_SUCH_ACTOR
        else:
            try:
                reason = receiver.deliver(delivery)
            except Exception:  # noqa: BLE001 - not our code; logged, and it must not end the node
                self._loop.count_raised()
                reason = FaultReason.FAILED
        if reason is not None:
            self.counters[f"fault_{reason.value}"] += 1
            delivery.fail(reason, _DETAILS.get(reason, "the receiver did not take it"))
        return reason

    def _watch_deadline(self, ask: Ask, on_end: Callable[[Ask], None]) -> None:
        """Let the loop end an ask inside this node for which no thread waits."""
        number = self._outbound.new_number()

        def forget(ended: Ask) -> None:
            self._asks.take(number)
            on_end(ended)

        ask.on_end = forget
        must_wake = self._asks.add(number, self.name, ask)
        if must_wake is None:
            self._answers.fail(ask, FaultReason.OVERLOADED, "too many asks wait for their replies")
        elif must_wake:
            self._loop.timers_changed()
        if self._loop.closed:  # nobody is left to look at deadlines
            self._answers.fail(ask, FaultReason.CLOSED, "this node was closed")

    def _receive(self, envelope: Envelope, address: Address, right: Right | None) -> None:
        """Deliver an ASK or TELL from another node to its receiver here."""
        now = _monotonic()
        deadline = self._from_bus_time(envelope.deadline)
        if deadline <= now:
            self._answers.send_back(envelope, FaultReason.EXPIRED, "its deadline passed on the way")
            return
        try:
            message = message_type(envelope.tag, envelope.version).from_json(envelope.body)
        except UnknownType as error:
            self._answers.send_back(envelope, FaultReason.UNHANDLED, str(error))
            return
        except CodecError as error:
            self._answers.send_back(envelope, FaultReason.INVALID, str(error))
            return
        answer: Callable[[Message, Sequence[bytes]], object] | None = None
        if envelope.kind is Kind.ASK:

            def answer(reply: Message, attachments: Sequence[bytes]) -> None:
                self._answers.send(envelope, reply, attachments)

        delivery = Delivery(address.path, envelope.sender, message, deadline, answer)
        delivery.attachments = envelope.attachments
        delivery.key = envelope.key or (_number_of(envelope) if message.changes else "")
        delivery.trace = envelope.trace
        delivery.generation = envelope.generation
        delivery.right = right
        self._loop.defer(partial(self._hand_over, delivery, envelope), serves=delivery.wants_reply)

    def _hand_over(self, delivery: Delivery, envelope: Envelope) -> None:
        reason = self._deliver_here(delivery)
        if reason is not None and envelope.kind is Kind.TELL:
            self._answers.send_back(
                envelope, reason, _DETAILS.get(reason, "it was not taken"), counted=True
            )

    # -- timers, and what both kinds do with frames --------------------------------------------

    def next_timer(self) -> float | None:
        alarm = self._alarm
        timers = (self._asks.next_at(), self._timer_at(), alarm[0] if alarm else None)
        moments = [moment for moment in timers if moment is not None]
        return min(moments) if moments else None

    def on_timer(self, now: float) -> None:
        for ask in self._asks.take_due(now):
            self._answers.fail(ask, FaultReason.EXPIRED, "no reply before the deadline")
        alarm = self._alarm
        if alarm is not None and now >= alarm[0]:
            self._alarm = None
            self.guard(alarm[1])
        self._on_timer(now)

    def _parse(self, frames: list[bytes]) -> list[Envelope]:
        """What a message from another node holds; what can't be read of it is counted."""
        envelopes = []
        for parts in self._unpacked(frames):
            try:
                envelopes.append(read_envelope(parts))
            except FrameError:
                self.counters["malformed"] += 1
        return envelopes

    def _unpacked(self, frames: list[bytes]) -> list[list[bytes]]:
        if not is_pack(frames):
            return [frames]
        try:
            return unpack(frames)
        except FrameError:
            self.counters["malformed"] += 1
            return []

    def _publish_here(self, envelope: Envelope) -> None:
        for subscription in self._subscriptions:
            if envelope.dest.startswith(subscription.prefix):
                try:
                    subscription.take(envelope)
                except CodecError:
                    self.counters["malformed"] += 1

    # -- what hub and leaf do differently --------------------------------------------------

    @abstractmethod
    def open_sockets(self) -> None:
        """Open the sockets, on the node's thread."""

    @abstractmethod
    def close_sockets(self) -> None:
        """Close the sockets, in a fixed order, on the node's thread."""

    @abstractmethod
    def sockets(self) -> Sequence[zmq.Socket[bytes]]:
        """The sockets to read."""

    @abstractmethod
    def take_frames(self, socket: zmq.Socket[bytes], frames: list[bytes]) -> int: ...

    @abstractmethod
    def transmit(self, envelopes: Sequence[Envelope]) -> None: ...

    @abstractmethod
    def _timer_at(self) -> float | None: ...

    @abstractmethod
    def _on_timer(self, now: float) -> None: ...

    @abstractmethod
    def _add_subscription(self, subscription: Subscription) -> None: ...

    @abstractmethod
    def _remove_subscription(self, subscription: Subscription) -> None: ...

    @abstractmethod
    def _from_bus_time(self, moment: float) -> float:
        """A bus time as this process's monotonic time."""


def _number_of(envelope: Envelope) -> str:
    """What tells a command without a key from every other one."""
    return f"{envelope.origin:x}-{envelope.sequence:x}"


_DETAILS = {
    FaultReason.NO_SUCH_ACTOR: "nothing receives at this address",
    FaultReason.MAILBOX_FULL: "the receiver's mailbox is full",
    FaultReason.MAILBOX_CLOSED: "the receiver has stopped",
    FaultReason.FAILED: "the receiver failed to take it",
}
