"""What is under way, by key, until its deadline.

Mostly it ends long before that. So nothing is kept in the order of deadlines, which would cost an
ask 1.5 us: when the earliest deadline has passed, all are looked at.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

# All are looked at so often at most (seconds), however their deadlines lie: 100,000 take 10 ms.
LOOK_SECONDS = 0.05


class Timed(Protocol):
    """Something that ends at a time of the monotonic clock, if not before."""

    @property
    def deadline(self) -> float: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Timed)


class UnderWay(Generic[K, V]):
    """Thread-safe. Each item is taken out once, by whoever comes first."""

    def __init__(self) -> None:
        self._items: dict[K, V] = {}
        self._lock = threading.Lock()
        self._earliest = math.inf  # no item that was not looked at since is due before
        self._looked_at = -math.inf

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def get(self, key: K) -> V | None:
        return self._items.get(key)

    def items(self) -> list[tuple[K, V]]:
        # Of a copy, which is made at once: between two items another thread may take one.
        return list(self._items.copy().items())

    def add(self, key: K, item: V) -> bool:
        """Add an item. True where it may be due before `next_at` said."""
        with self._lock:
            self._items[key] = item
            is_earliest = item.deadline < self._earliest
            if is_earliest:
                self._earliest = item.deadline
            return is_earliest

    def take(self, key: K) -> V | None:
        """Take an item out. Without the lock: a dict's `pop` gives it to one thread."""
        return self._items.pop(key, None)

    def next_at(self) -> float | None:
        """When to call `take_due`; None where nothing is under way."""
        with self._lock:
            if not self._items:
                self._earliest = math.inf
                return None
            return self._look_at()

    def take_due(self, now: float) -> list[tuple[K, V]]:
        """Take out what is due."""
        with self._lock:
            if now < self._look_at():
                return []
            self._looked_at = now
            self._earliest = math.inf
            due = []
            for key, item in self.items():
                if item.deadline <= now:
                    due.append(key)
                elif item.deadline < self._earliest:
                    self._earliest = item.deadline
        return [(key, taken) for key in due if (taken := self.take(key)) is not None]

    def _look_at(self) -> float:
        return max(self._earliest, self._looked_at + LOOK_SECONDS)
