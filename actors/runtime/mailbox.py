"""An actor's mailbox: bounded, two lanes, closable, and honest about what it did not take.

Control overtakes data. Data is bounded by the number the actor names, with the overflow policy it
names; control has a bound of its own. After `close` a put is refused: pykka's queue takes it and
loses it, which is how its own asks get lost when they race with a stop.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from voidbus.transport.delivery import Delivery, Driver
from voidbus.transport.fault import FaultReason

# Control messages that may wait: commands, not work. What an actor caused itself (timers, replies
# to its own asks, notices) is bounded by what caused it and never refused.
CONTROL_LIMIT = 1024

_monotonic = time.monotonic


class Overflow(StrEnum):
    """What a full mailbox does with one more data message."""

    REFUSE = "refuse"  # the sender gets `mailbox_full`
    DROP_OLDEST = "drop_oldest"  # the oldest one's sender gets `mailbox_full`


class Internal(Protocol):
    """A mailbox entry that is no message: it runs in the actor's own thread."""

    def __call__(self) -> None: ...


class Waited(ABC):
    """An internal entry somebody waits for, who is told when it will not run."""

    __slots__ = ()

    @abstractmethod
    def __call__(self) -> None:
        """Run it."""

    @abstractmethod
    def refuse(self, reason: FaultReason) -> None:
        """Tell who waits why it does not run."""


Item = Delivery | Internal


_Lane = deque[tuple[float, Item]]


def _next(lane: _Lane) -> Item | None:
    try:
        return lane.popleft()[1]
    except IndexError:
        return None


def _drained(lane: _Lane) -> list[Item]:
    items = []
    while (item := _next(lane)) is not None:
        items.append(item)
    return items


def _since(lane: _Lane) -> list[float]:
    """When the oldest item came (monotonic), if there is one."""
    try:
        return [lane[0][0]]
    except IndexError:
        return []


@dataclass(frozen=True, slots=True)
class MailboxStatistics:
    """What a mailbox holds and did. `head_age` is how long, in seconds, its oldest item waits."""

    depth: int
    control_depth: int
    limit: int
    head_age: float
    accepted: int
    refused: int
    shed: int
    closed: bool


class Mailbox:
    """Items for one consumer from any number of producers.

    `limit` bounds the data lane and has no default. Which lane an item goes to is its producer's
    say; within a lane items keep their order. Raises ValueError for a limit below 1.
    """

    __slots__ = (
        "_closed",
        "_control",
        "_data",
        "_driver",
        "_lock",
        "_overflow",
        "_ready",
        "_room",
        "_waiting",
        "_want_room",
        "accepted",
        "limit",
        "refused",
        "shed",
    )

    def __init__(self, limit: int, overflow: Overflow) -> None:
        if limit < 1:
            raise ValueError(f"a mailbox holds at least 1 message, not {limit}")
        self.limit = limit
        self._overflow = overflow
        self._data: _Lane = deque()
        self._control: _Lane = deque()
        self._lock = threading.Lock()
        # A bare lock as a binary semaphore: queue.Queue's conditions cost three times as much.
        self._ready = threading.Lock()
        self._ready.acquire()
        self._waiting = False
        self._driver: Driver | None = None
        self._room = threading.Condition(self._lock)
        self._want_room = 0
        self._closed = False
        self.accepted = 0
        self.refused = 0
        self.shed = 0

    def put(self, item: Item, *, control: bool = False) -> FaultReason | None:
        """Take an item, or say why not: `mailbox_full` or `mailbox_closed`. Never blocks."""
        shed: Item | None = None
        with self._lock:
            if not control and not self._closed and len(self._data) < self.limit:
                # The one case that has to be quick.
                self._data.append((_monotonic(), item))
                self.accepted += 1
                if self._waiting:
                    self._wake()
                return None
            if self._closed:
                self.refused += 1
                return FaultReason.MAILBOX_CLOSED
            if control:
                if len(self._control) >= CONTROL_LIMIT and isinstance(item, Delivery):
                    self.refused += 1
                    return FaultReason.MAILBOX_FULL
                self._control.append((_monotonic(), item))
            else:
                if self._overflow is Overflow.REFUSE:
                    self.refused += 1
                    return FaultReason.MAILBOX_FULL
                shed = _next(self._data)
                self.shed += shed is not None
                self._data.append((_monotonic(), item))
            self._accepted()
        if isinstance(shed, Delivery):
            shed.fail(FaultReason.MAILBOX_FULL, "newer messages took its place in a full mailbox")
        elif isinstance(shed, Waited):
            shed.refuse(FaultReason.MAILBOX_FULL)
        return None

    def put_wait(self, item: Item, timeout: float) -> FaultReason | None:
        """Like `put` on the data lane, but wait for room: how a reader thread is slowed down.

        It sheds nothing, whatever the overflow policy. Not for the consumer's own thread.
        """
        deadline = _monotonic() + timeout
        with self._room:
            # Wanted first, then looked for: the consumer takes, and then looks who wants it.
            self._want_room += 1
            try:
                while not self._closed and len(self._data) >= self.limit:
                    remaining = deadline - _monotonic()
                    if remaining <= 0:
                        self.refused += 1
                        return FaultReason.MAILBOX_FULL
                    self._room.wait(min(remaining, threading.TIMEOUT_MAX))
            finally:
                self._want_room -= 1
            if self._closed:
                self.refused += 1
                return FaultReason.MAILBOX_CLOSED
            # Taken under the lock that saw the room: another producer can't get in between.
            self._data.append((_monotonic(), item))
            self._accepted()
        return None

    def _accepted(self) -> None:
        """Count an item and wake the consumer. With the lock held."""
        self.accepted += 1
        if self._waiting:
            self._wake()

    def _wake(self) -> None:
        """Wake the consumer, which waits. With the lock held."""
        self._waiting = False
        self._ready.release()
        if self._driver is not None:
            self._driver.released(self._ready)

    def get(self, timeout: float | None = None) -> Item | None:
        """The next item, control first. None when `timeout` passed, or it is closed and empty."""
        wait = -1 if timeout is None else min(max(0.0, timeout), threading.TIMEOUT_MAX)
        while True:
            item = self._take()
            if item is not None:
                return item
            with self._lock:
                if self._control or self._data:
                    continue
                if self._closed:
                    return None
                self._waiting = True
            # After a wake-up there is an item, or it was closed, so this waits only once.
            if not self._wait(wait):
                with self._lock:
                    if self._waiting:
                        self._waiting = False
                        return None
                # A put came between the end of the wait and here, and has released `_ready`.
                self._ready.acquire()

    def _take(self) -> Item | None:
        """The next item there is. Without the lock, over which the consumer and whoever sends to it
        would wake each other: a fifth of a message's cost. So an item leaves a lane by `popleft`
        only, which gives it to one thread, and whatever was seen there may be gone.
        """
        try:
            if self._control:
                return self._control.popleft()[1]
            item = self._data.popleft()[1]
        except IndexError:
            return None
        if self._want_room:
            with self._lock:
                self._room.notify_all()
        return item

    def drive(self, driver: Driver) -> None:
        """Let the consumer drive a node's sockets while it waits and nobody else does."""
        self._driver = driver

    def _wait(self, timeout: float) -> bool:
        if self._driver is None:
            return self._ready.acquire(timeout=timeout)
        return self._driver.wait(self._ready, timeout)

    def close(self) -> list[Item]:
        """Take nothing more; returns what was waiting, for its senders to be told."""
        with self._lock:
            self._closed = True
            rest = [*_drained(self._control), *_drained(self._data)]
            self._room.notify_all()
            if self._waiting:
                self._wake()
        return rest

    def statistics(self) -> MailboxStatistics:
        """A consistent view, from any thread."""
        with self._lock:
            heads = [since for lane in (self._control, self._data) for since in _since(lane)]
            return MailboxStatistics(
                depth=len(self._data),
                control_depth=len(self._control),
                limit=self.limit,
                head_age=_monotonic() - min(heads) if heads else 0.0,
                accepted=self.accepted,
                refused=self.refused,
                shed=self.shed,
                closed=self._closed,
            )
