"""Watches the inbox by the sidecar's signals, while a client wants to know of changes."""

import json
import threading
from typing import Protocol

from voidbus.sidecar.client import POLL_SECONDS, Abort, Cancelled, SidecarClient, SidecarClientError

_FIRST_DELAY = 0.1  # seconds before a sidecar that failed is asked again; doubles
_LONGEST_DELAY = 5.0
_JOIN = 5.0  # seconds for the thread to end once its request is cut


class Watcher(Protocol):
    """Who is told."""

    @property
    def is_watching(self) -> bool: ...
    def inbox_changed(self) -> None: ...
    def log(self, level: str, text: str) -> None: ...


class Watch:
    """One thread for all sessions; it runs only while one of them wants it."""

    def __init__(self, client: SidecarClient) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._watchers: list[Watcher] = []
        self._thread: threading.Thread | None = None
        self._abort = Abort()
        self._ended = threading.Event()
        self._closed = False

    def attach(self, watcher: Watcher) -> None:
        """Tell this one too."""
        with self._lock:
            self._watchers.append(watcher)

    def detach(self, watcher: Watcher) -> None:
        """Tell it no more."""
        with self._lock:
            self._watchers = [each for each in self._watchers if each is not watcher]
        self.look()

    def start(self, version: int) -> None:
        """Watch for what comes after a version, unless that is done already."""
        with self._lock:
            if self._thread is not None or self._closed:
                return
            self._abort, self._ended = Abort(), threading.Event()
            self._thread = threading.Thread(
                target=self._run,
                args=(version, self._abort, self._ended),
                name="inbox-watch",
                daemon=True,
            )
            try:
                self._thread.start()
            except RuntimeError:  # the guest gives us no thread more; the next who asks tries again
                self._thread = None

    def look(self) -> None:
        """Stop watching when nobody wants it."""
        with self._lock:
            if self._thread is None or any(each.is_watching for each in self._watchers):
                return
            thread, self._thread = self._thread, None
            self._ended.set()
            self._abort.cancel()
        if thread is not threading.current_thread():
            thread.join(_JOIN)

    def close(self) -> None:
        """Stop for good, and join the thread."""
        with self._lock:
            self._closed = True
            self._watchers.clear()
        self.look()

    def _run(self, since: int, abort: Abort, ended: threading.Event) -> None:
        delay = _FIRST_DELAY
        failing = False
        while not ended.is_set():
            try:
                # After a fault without waiting, to know at once whether that is over.
                version = self._ask(since, abort, 0.0 if failing else POLL_SECONDS)
            except Cancelled:
                return
            except SidecarClientError as fault:
                if not failing:
                    self._log("warning", f"the inbox can't be watched, trying again: {fault}")
                failing = True
                ended.wait(delay)
                delay = min(2 * delay, _LONGEST_DELAY)
                continue
            if failing:
                self._log("info", "the inbox is watched again")
            failing, delay = False, _FIRST_DELAY
            if version != since:
                since = version
                for watcher in self._everyone():
                    watcher.inbox_changed()

    def _ask(self, since: int, abort: Abort, seconds: float) -> int:
        reply = self._client.signals(since, abort, seconds=seconds)
        if reply.status >= 400:
            raise SidecarClientError(f"HTTP {reply.status}")
        try:
            version = json.loads(reply.body)["version"]
        except (ValueError, TypeError, KeyError, RecursionError):
            version = None
        if isinstance(version, bool) or not isinstance(version, int):
            raise SidecarClientError("the sidecar's answer is no inbox")
        return version

    def _log(self, level: str, text: str) -> None:
        for watcher in self._everyone():
            watcher.log(level, text)

    def _everyone(self) -> list[Watcher]:
        with self._lock:
            return list(self._watchers)
