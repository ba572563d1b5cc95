"""Gapless numbers on published topics, and the subscriber's account of what it lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from voidbus.transport.message import Message

# The longest prefix one may subscribe to (bytes): libzmq keeps a node of a tree for each byte.
PREFIX_LIMIT = 1024


class TopicSequencer:
    """The publisher's side: the numbers of each topic, starting at 1. Not thread-safe."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def next(self, topic: str) -> int:
        number = self._last.get(topic, 0) + 1
        self._last[topic] = number
        return number

    def last(self, topic: str) -> int:
        return self._last.get(topic, 0)

    def note(self, topic: str, number: int) -> None:
        """Publication `number` has been sent."""
        self._last[topic] = number

    def matching(self, prefix: str) -> list[tuple[str, int]]:
        """Topics that a subscription to `prefix` covers, with their last numbers."""
        return [(topic, last) for topic, last in self._last.items() if topic.startswith(prefix)]

    def retire(self, topic: str) -> None:
        """Forget a topic that nothing more will be published on."""
        self._last.pop(topic, None)


class Verdict(Enum):
    """What a number means for a subscriber."""

    NEXT = auto()
    DUPLICATE = auto()
    GAP = auto()


@dataclass(frozen=True, slots=True)
class Gap:
    """Publications `first` to `last` of `topic` never arrived."""

    topic: str
    epoch: int
    first: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1


class TopicTracker:
    """The subscriber's side of one topic: says whether a number is next, old, or after a gap.

    A new epoch (the publisher was restarted) starts a new count. What was published before the
    subscription took effect is no loss: the first number seen, or a mark's, sets the start.
    """

    __slots__ = ("epoch", "last", "lost", "topic")

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.epoch = 0
        self.last = -1
        self.lost = 0

    def observe(self, epoch: int, number: int, *, mark: bool = False) -> tuple[Verdict, Gap | None]:
        """Account for publication `number`, or for a mark saying `number` was the last one."""
        if epoch != self.epoch or self.last < 0:
            self.epoch = epoch
            self.last = number
            return (Verdict.DUPLICATE if mark else Verdict.NEXT), None
        if number <= self.last:
            return Verdict.DUPLICATE, None
        first_missing = self.last + 1
        last_missing = number if mark else number - 1
        self.last = number
        if last_missing < first_missing:
            return Verdict.NEXT, None
        self.lost += last_missing - first_missing + 1
        return Verdict.GAP, Gap(self.topic, epoch, first_missing, last_missing)


@dataclass(frozen=True, slots=True)
class Publication:
    """A message as a subscriber gets it."""

    topic: str
    epoch: int
    number: int
    message: Message


OnPublication = Callable[[Publication], None]
OnGap = Callable[[Gap], None]
