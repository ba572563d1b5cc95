"""Runs that have ended, held as they were last read: nothing of them changes any more."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True)
class HeldRun:
    """A run's state as JSON and all its events as JSON, a line each; `last_seq` is the newest's."""

    state: bytes
    events: bytes
    last_seq: int

    @property
    def size(self) -> int:
        return len(self.state) + len(self.events)


class HeldRuns:
    """The runs read last, of `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._runs: OrderedDict[str, HeldRun] = OrderedDict()
        self._size = 0

    def get(self, run_id: str) -> HeldRun | None:
        run = self._runs.get(run_id)
        if run is not None:
            self._runs.move_to_end(run_id)
        return run

    def hold(self, run_id: str, run: HeldRun) -> None:
        """Hold it, in place of those that nobody has read for longest."""
        before = self._runs.pop(run_id, None)
        self._size += run.size - (0 if before is None else before.size)
        self._runs[run_id] = run
        while self._size > self._limit:
            self._size -= self._runs.popitem(last=False)[1].size

    def clear(self) -> None:
        """Hold none: some were pruned."""
        self._runs.clear()
        self._size = 0
