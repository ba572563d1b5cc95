"""An actor's timers: calls in its own thread at times to come, on the clock it is given."""

from __future__ import annotations

import heapq
from collections.abc import Callable

# Below this many timers, cancelled ones are not worth sweeping out.
_SWEEP_AT_LEAST = 64


class Timer:
    """A call in the actor's thread at a time to come."""

    __slots__ = ("cancelled", "run")

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class TimerQueue:
    """Timers in the order of their times; equal times in the order they were set.

    For one thread. A cancelled timer is swept out when as many more have been set as there were,
    so one that is set and cancelled for every message costs no memory.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Timer]] = []
        self._number = 0
        self._sweep_at = _SWEEP_AT_LEAST

    def __bool__(self) -> bool:
        """Whether any timer is set, also one that was cancelled since."""
        return bool(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def after(self, seconds: float, run: Callable[[], None]) -> Timer:
        """Call `run` in `seconds`."""
        if len(self._heap) >= self._sweep_at:
            self._heap = [entry for entry in self._heap if not entry[2].cancelled]
            heapq.heapify(self._heap)
            self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(self._heap))
        timer = Timer(run)
        self._number += 1
        heapq.heappush(self._heap, (self._clock() + seconds, self._number, timer))
        return timer

    def run_due(self, stopped: Callable[[], bool]) -> float | None:
        """Run what is due, until `stopped` says so; how long to wait for the next one.

        What the timers set anew waits for the next call, however soon it is due: a timer that
        sets itself again at once leaves the messages their turn.
        """
        if not self._heap:
            return None
        now, last = self._clock(), self._number
        late: list[tuple[float, int, Timer]] = []
        try:
            while self._heap and self._heap[0][0] <= now and not stopped():
                entry = heapq.heappop(self._heap)
                if entry[2].cancelled:
                    continue
                if entry[1] > last:
                    late.append(entry)
                    continue
                entry[2].run()
        finally:
            for entry in late:
                heapq.heappush(self._heap, entry)
        while self._heap and self._heap[0][2].cancelled:
            heapq.heappop(self._heap)
        return max(0.0, self._heap[0][0] - self._clock()) if self._heap else None
