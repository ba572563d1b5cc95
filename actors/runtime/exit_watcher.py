"""One thread that sees the death of any number of processes the moment it happens.

A pidfd becomes readable when its process ends (pidfd_open(2)), so one epoll over pidfds sleeps
until there is something to tell; nothing is polled.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from voidbus.actors.runtime.process import ProcessHandle

_log = logging.getLogger(__name__)

OnExit = Callable[[ProcessHandle], None]


@dataclass(frozen=True, slots=True)
class _Watch:
    handle: ProcessHandle
    on_exit: OnExit


class ExitWatcher:
    """Calls back, in its own thread, once for each watched process that ended.

    Callbacks must be short, as they delay one another; one that raises is logged. The watcher
    keeps its own copy of each pidfd, so a handle may be closed while it is watched.
    """

    def __init__(self, name: str = "exit-watcher") -> None:
        self._lock = threading.Lock()
        self._watches: dict[int, _Watch] = {}
        self._closing = False
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def watch(self, handle: ProcessHandle, on_exit: OnExit) -> None:
        """Call `on_exit(handle)` when the process ends, at once if it has ended.

        Raises RuntimeError after `close`.
        """
        with self._lock:
            if self._closing:
                raise RuntimeError(f"the watcher is closed and can't watch {handle.identity}")
            fd = os.dup(handle.fileno())
            self._watches[fd] = _Watch(handle, on_exit)
            self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, handle: ProcessHandle) -> bool:
        """Forget a handle; False if it wasn't watched, or its call has begun."""
        with self._lock:
            found = [fd for fd, watch in self._watches.items() if watch.handle is handle]
            for fd in found:
                self._forget(fd)
            return bool(found)

    def close(self, timeout: float = 5.0) -> None:
        """Forget everything and join the thread. Raises TimeoutError if a callback holds it up."""
        with self._lock:
            if not self._closing:
                self._closing = True
                os.eventfd_write(self._wake, 1)
        if threading.current_thread() is self._thread:
            return  # a callback closes its own watcher: the thread ends after it
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the exit watcher's callback has not returned after {timeout:g} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._closing:
                for fd, _ in self._epoll.poll():
                    self._tell(fd)
        finally:
            with self._lock:
                self._closing = True
                for fd in list(self._watches):
                    self._forget(fd)
                self._epoll.close()
                os.close(self._wake)

    def _tell(self, fd: int) -> None:
        with self._lock:
            watch = self._watches.get(fd)
            # The number may have been closed and used anew since epoll named it: look again.
            if self._closing or watch is None or not _ended(fd):
                return
            self._forget(fd)
        try:
            watch.on_exit(watch.handle)
        except BaseException:  # noqa: BLE001 - one callback must not end the others' thread
            _log.exception("the exit callback of %s failed", watch.handle.identity)

    def _forget(self, fd: int) -> None:
        del self._watches[fd]
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
        os.close(fd)


def _ended(pidfd: int) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(0))
