"""One thread that waits on descriptors for devices, and ends with a reason when one breaks."""

from __future__ import annotations

import collections
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections.abc import Callable

from voidbus.vm.devices.faults import DeviceError

log = logging.getLogger(__name__)

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANGUP = select.EPOLLHUP | select.EPOLLERR
"""Reported whatever is asked for; so a descriptor nothing is wanted of is not to be watched."""
EDGE = select.EPOLLET
"""Report a change once and not the state again and again. For the eventfd of a kick: every write
to it is a change, so it need not be read."""

MAX_TASKS = 4096
"""Tasks other threads may have waiting for the loop."""

_EVENTS = 128
_JOIN_SECONDS = 10.0


class Timer:
    """A task for later. ``cancel`` may be called at any time, on the loop's thread."""

    __slots__ = ("task",)

    def __init__(self, task: Callable[[], None]) -> None:
        self.task: Callable[[], None] | None = task

    def cancel(self) -> None:
        self.task = None


class EventLoop:
    """An epoll loop in a thread of its own. ``start`` and ``close`` are the owner's, ``call`` is
    anybody's; all else belongs to the loop's thread (tasks, callbacks), or to the owner before
    ``start``.

    A callback or task that raises ends the loop: the functions given to ``at_end`` run, then
    ``on_failed`` gets the reason, once, on this thread. ``close`` ends it without a reason.
    """

    def __init__(self, name: str, on_failed: Callable[[str], None]) -> None:
        self._name = name
        self._on_failed = on_failed
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._soon: collections.deque[Callable[[], None]] = collections.deque()
        self._lock = threading.Lock()
        self._tasks: collections.deque[Callable[[], None]] = collections.deque()
        self._at_end: list[Callable[[], None]] = []
        self._closing = False
        self._ended = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._wake, READ, self._run_tasks)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._started = False

    # -- the owner's ----------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread. Once."""
        self._started = True
        self._thread.start()

    def close(self) -> None:
        """End the loop, let the ``at_end`` functions run, and join the thread. Again is fine."""
        with self._lock:
            self._closing = True
            if not self._ended:
                os.eventfd_write(self._wake, 1)
        if not self._started:
            if not self._ended:
                self._finish()
        elif self._thread is not threading.current_thread():
            self._thread.join(_JOIN_SECONDS)
            if self._thread.is_alive():
                log.error("%s: the device thread did not end in %g s", self._name, _JOIN_SECONDS)

    # -- anybody's ------------------------------------------------------------------------

    def call(self, task: Callable[[], None]) -> bool:
        """Run a task on the loop's thread. False if it never will: the loop has ended, or
        MAX_TASKS are waiting. One that was taken does run, at the latest when the loop ends."""
        with self._lock:
            if self._closing or self._ended or len(self._tasks) >= MAX_TASKS:
                return False
            if not self._tasks:
                os.eventfd_write(self._wake, 1)
            self._tasks.append(task)
            return True

    # -- the loop's own thread ------------------------------------------------------------

    def watch(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call ``callback(events)`` while ``fd`` has one of ``events`` (READ, WRITE) or HANGUP.
        The descriptor stays the caller's. Raises OSError (one that can't be waited on)."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def change(self, fd: int, events: int) -> None:
        """Wait for other events of a watched descriptor."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching; before the descriptor is closed. One not watched is let be."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def soon(self, task: Callable[[], None]) -> None:
        """Run a task in the next turn, after descriptors had theirs."""
        self._soon.append(task)

    def later(self, seconds: float, task: Callable[[], None]) -> Timer:
        """Run a task after ``seconds``, unless it is cancelled."""
        timer = Timer(task)
        entry = (time.monotonic() + seconds, next(self._numbers), timer)
        heapq.heappush(self._timers, entry)
        return timer

    def at_end(self, task: Callable[[], None]) -> None:
        """Run this when the loop ends, the last given first."""
        self._at_end.append(task)

    def turn(self, longest: float | None = None) -> int:
        """Wait for something to do, at most ``longest`` seconds, and do it. How many callbacks
        and tasks ran. The thread does nothing else; without one, its owner may."""
        count = 0
        for fd, events in self._epoll.poll(self._timeout(longest), _EVENTS):
            # One before it in this turn may have unwatched it.
            if (callback := self._callbacks.get(fd)) is not None:
                callback(events)
                count += 1
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            task = heapq.heappop(self._timers)[2].task
            if task is not None:
                task()
                count += 1
        for _ in range(len(self._soon)):
            self._soon.popleft()()
            count += 1
        return count

    # -- inside ---------------------------------------------------------------------------

    def _run(self) -> None:
        reason: str | None = None
        try:
            while not self._closing:
                self.turn()
        except DeviceError as error:
            reason = str(error)
        except Exception as error:  # the end of the thread: whatever it was is told
            log.exception("%s: a defect ended the device thread", self._name)
            reason = f"a defect in a device: {type(error).__name__}: {error}"
        self._finish()
        if reason is not None:
            self._on_failed(reason)

    def _timeout(self, longest: float | None) -> float | None:
        if self._soon:
            return 0
        if not self._timers:
            return longest
        due = max(0.0, self._timers[0][0] - time.monotonic())
        return due if longest is None else min(due, longest)

    def _run_tasks(self, _: int) -> None:
        os.eventfd_read(self._wake)
        with self._lock:
            tasks, self._tasks = self._tasks, collections.deque()
        for task in tasks:
            task()

    def _finish(self) -> None:
        with self._lock:
            self._ended = True
            tasks, self._tasks = self._tasks, collections.deque()
        for task in (*tasks, *reversed(self._at_end)):
            try:
                task()
            except DeviceError:
                pass  # one is enough
            except Exception:
                log.exception("%s: releasing a device failed", self._name)
        self._at_end.clear()
        self._soon.clear()
        self._timers.clear()
        self._callbacks.clear()
        self._epoll.close()
        os.close(self._wake)
