"""Asks and deliveries: how a question ends, whoever asked and wherever the answer comes from."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from voidbus.transport.fault import BusError, Fault, FaultReason
from voidbus.transport.message import Message, Right
from voidbus.transport.under_way import UnderWay

_allocate_lock = threading.Lock
_monotonic = time.monotonic


class Driver(Protocol):
    """What drives the sockets that bring an answer, and may let the thread that waits do it.

    The main thread may not: what a signal's handler raises there could tear a message in two.
    """

    main_thread: int

    def wait(self, latch: threading.Lock, timeout: float) -> bool:
        """Wait until `latch` can be had, and have it. False where `timeout` seconds (-1: no end)
        have passed before. Not for the main thread."""

    def released(self, latch: threading.Lock) -> None:
        """To be called when `latch` was released."""


class Ask:
    """A question under way. It ends exactly once: with a reply, a fault, or at its deadline.

    `deadline` is on this process's monotonic clock. Any thread may wait for it; `on_end`, when
    given, is called once by whichever thread ends it and must be quick. `node` may answer it.
    """

    __slots__ = (
        "_awaited",
        "_claim",
        "_driver",
        "_waiter",
        "address",
        "attachments",
        "deadline",
        "node",
        "on_end",
        "outcome",
    )

    def __init__(
        self,
        address: str,
        deadline: float,
        on_end: Callable[[Ask], None] | None = None,
        *,
        driver: Driver | None = None,
    ) -> None:
        self.address = address
        self.deadline = deadline
        self.node = ""
        self.outcome: Message | None = None
        self.attachments: Sequence[bytes] = ()
        self.on_end = on_end
        self._driver = driver
        self._awaited = False  # by a thread that may drive the sockets meanwhile
        # Two bare locks, half the cost of the Condition in pykka's future: whoever gets the claim
        # ends the ask, and the waiter is held until then.
        self._claim = _allocate_lock()
        self._waiter = _allocate_lock()
        self._waiter.acquire()

    def end(self, outcome: Message, attachments: Sequence[bytes] = ()) -> bool:
        """Give the outcome. False, and no effect, where the ask has ended already."""
        if not self._claim.acquire(False):
            return False
        self.attachments = attachments
        self.outcome = outcome
        self._let_go()
        if self.on_end is not None:
            self.on_end(self)
        return True

    def _let_go(self) -> None:
        """Let the next one go that waits."""
        self._waiter.release()
        if self._awaited and self._driver is not None:
            self._driver.released(self._waiter)

    @property
    def ended(self) -> bool:
        return self.outcome is not None

    def wait(self) -> Message:
        """The reply or the Fault; at the deadline, a Fault that says so."""
        if self.outcome is None:
            if self._wait_for_end(max(0.0, self.deadline - _monotonic())):
                self._let_go()
            else:
                self.end(
                    Fault(
                        reason=FaultReason.EXPIRED,
                        detail="no reply before the deadline",
                        address=self.address,
                    )
                )
        # Whoever ended it stores the outcome before releasing the waiter.
        while self.outcome is None:
            if self._waiter.acquire(timeout=1.0):
                self._waiter.release()
        return self.outcome

    def _wait_for_end(self, timeout: float) -> bool:
        if self._driver is None or threading.get_ident() == self._driver.main_thread:
            return self._waiter.acquire(timeout=timeout)
        self._awaited = True
        return self._driver.wait(self._waiter, timeout)

    def result(self) -> Message:
        """The reply. Raises BusError with the fault where there was one."""
        outcome = self.wait()
        if isinstance(outcome, Fault):
            raise BusError(outcome)
        return outcome


class Delivery:
    """A message at its receiver, with what is known of where it came from.

    `right` is the right of the link it came in by; None where it was sent inside this node.
    `answer` takes the reply to an ask.
    """

    # What few messages have is set for those: most are tells inside a node, of which each of these
    # would take a hundredth of the time.
    attachments: Sequence[bytes] = ()
    key = ""
    trace = ""
    generation = 0
    right: Right | None = None
    wants_reply = False
    _answer: Callable[[Message, Sequence[bytes]], object] | None = None

    def __init__(
        self,
        path: str,
        sender: str,
        message: Message,
        deadline: float,
        answer: Callable[[Message, Sequence[bytes]], object] | None = None,
    ) -> None:
        self.path = path
        self.sender = sender
        self.message = message
        self.deadline = deadline
        if answer is not None:
            self.wants_reply = True
            self._answer = answer

    @property
    def expired(self) -> bool:
        """Whether the deadline has passed, so that nobody waits for this any more."""
        return _monotonic() >= self.deadline

    def reply(self, message: Message, attachments: Sequence[bytes] = ()) -> None:
        """Answer an ask. A second answer, or one to a tell, has no effect."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(message, attachments)

    def tap(self, observe: Callable[[Message, Sequence[bytes]], None]) -> None:
        """Let `observe` see the answer when it is given."""
        answer = self._answer

        def observed(message: Message, attachments: Sequence[bytes]) -> None:
            observe(message, attachments)
            if answer is not None:
                answer(message, attachments)

        self._answer = observed

    def fail(self, reason: FaultReason, detail: str) -> None:
        """Answer with a fault."""
        self.reply(Fault(reason=reason, detail=detail, address=self.path))


class Receiver(Protocol):
    """What a node delivers to. `deliver` is called on any thread and must not block."""

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        """Take the message, or say why not."""


class PendingAsks:
    """The asks a node waits for, by number. Thread-safe and bounded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._asks: UnderWay[int, Ask] = UnderWay()

    def __len__(self) -> int:
        return len(self._asks)

    def add(self, number: int, node: str, ask: Ask) -> bool | None:
        """Wait for `ask` of `node`. None: the table is full. True: the sleeper must wake."""
        if len(self._asks) >= self._limit:
            return None
        ask.node = node
        return self._asks.add(number, ask)

    def take(self, number: int, node: str | None = None) -> Ask | None:
        """Stop waiting and return the ask; None where it isn't waited for, or not of `node`."""
        if node is not None:
            ask = self._asks.get(number)
            if ask is None or ask.node != node:
                return None
        return self._asks.take(number)

    def take_nodes(self, chosen: Callable[[str], bool]) -> list[Ask]:
        """Stop waiting for everything asked of the nodes that are `chosen`."""
        numbers = [number for number, ask in self._asks.items() if chosen(ask.node)]
        return [ask for number in numbers if (ask := self._asks.take(number)) is not None]

    def take_due(self, now: float) -> list[Ask]:
        return [ask for _, ask in self._asks.take_due(now)]

    def next_at(self) -> float | None:
        return self._asks.next_at()


class ReplyStore:
    """The replies to commands, so that a repeat is answered and not carried out again.

    Bounded by count and by age; used by one actor, from its own thread only.
    """

    def __init__(self, limit: int, ttl: float) -> None:
        self._limit = limit
        self._ttl = ttl
        self._entries: OrderedDict[str, _Stored] = OrderedDict()
        self.repeats = 0

    def begin(self, key: str, delivery: Delivery, now: float) -> bool:
        """Note a command. False where it is a repeat, which then gets the first one's reply."""
        self._forget(lambda oldest: oldest.since + self._ttl <= now)
        stored = self._entries.get(key)
        if stored is None:
            self._forget(lambda _: len(self._entries) >= self._limit)
            self._entries[key] = _Stored(now)
            return True
        self.repeats += 1
        if stored.reply is not None:
            delivery.reply(*stored.reply)
        elif len(stored.waiting) < 64:
            stored.waiting.append(delivery)
        else:
            delivery.fail(FaultReason.OVERLOADED, "64 repeats of this command wait already")
        return False

    def finish(self, key: str, reply: Message, attachments: Sequence[bytes]) -> None:
        """Store the reply and give it to the repeats that came meanwhile."""
        stored = self._entries.get(key)
        if stored is None:
            return
        stored.reply = (reply, attachments)
        waiting, stored.waiting = stored.waiting, []
        for delivery in waiting:
            delivery.reply(reply, attachments)

    def _forget(self, must_go: Callable[[_Stored], bool]) -> None:
        while self._entries:
            oldest = next(iter(self._entries))
            if not must_go(self._entries[oldest]):
                return
            for delivery in self._entries.pop(oldest).waiting:
                delivery.fail(FaultReason.OVERLOADED, "the command was forgotten before it ended")


class _Stored:
    __slots__ = ("reply", "since", "waiting")

    def __init__(self, since: float) -> None:
        self.since = since
        self.reply: tuple[Message, Sequence[bytes]] | None = None
        self.waiting: list[Delivery] = []
