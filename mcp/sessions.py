"""Sessions of HTTP clients by their ids, and what waits for each to be told."""

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from voidbus.mcp.link import Link

MAX_SESSIONS = 64
"""Sessions at once. Past it the one that was used longest ago makes room: clients that crash
never end theirs."""

MAX_UNTOLD = 64
"""Messages that wait for a client to fetch them; past it the oldest is dropped."""


class Outbox:
    """Messages for a client who fetches them when it will. `bell` is a descriptor that can be
    read from when something is there, or who fetches has been replaced."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[dict[str, Any]] = deque(maxlen=MAX_UNTOLD)
        self._bell: int | None = None

    def put(self, body: dict[str, Any]) -> None:
        """Add a message, unless the very same one waits already: "it has changed" twice says
        no more than once."""
        with self._lock:
            if body not in self._waiting:
                self._waiting.append(body)
            self._ring()

    def open(self) -> int:
        """Become the one who fetches; a new bell. Who did before finds itself replaced."""
        with self._lock:
            self._ring()
            self._bell = os.eventfd(1 if self._waiting else 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return self._bell

    def take(self, bell: int) -> list[dict[str, Any]] | None:
        """All that waits; None for one who has been replaced."""
        with self._lock:
            if self._bell != bell:
                return None
            taken = list(self._waiting)
            self._waiting.clear()
            return taken

    def close(self, bell: int) -> None:
        """Fetch no more."""
        with self._lock:
            if self._bell == bell:
                self._bell = None
            os.close(bell)

    def dismiss(self) -> None:
        """Replace who fetches by nobody."""
        with self._lock:
            self._ring()
            self._bell = None

    def _ring(self) -> None:
        if self._bell is not None:
            os.eventfd_write(self._bell, 1)


class Client:
    """One HTTP client: its link, and what waits for it."""

    def __init__(self, make_link: Callable[[Callable[[dict[str, Any]], None]], Link]) -> None:
        self.outbox = Outbox()
        self.link = make_link(self.outbox.put)

    def close(self) -> None:
        """End its work, and its stream."""
        for body in self.link.close():
            self.outbox.put(body)
        self.outbox.dismiss()


class Sessions:
    """Clients by session id. Thread-safe."""

    def __init__(self, limit: int = MAX_SESSIONS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}  # the one used longest ago first

    def __len__(self) -> int:
        return len(self._clients)

    def add(self, client: Client) -> str:
        """Begin a session; its id, which can't be guessed."""
        session_id = os.urandom(16).hex()
        with self._lock:
            oldest = next(iter(self._clients)) if len(self._clients) >= self._limit else None
            ended = None if oldest is None else self._clients.pop(oldest)
            self._clients[session_id] = client
        if ended is not None:
            ended.close()
        return session_id

    def get(self, session_id: str) -> Client | None:
        """The client of a session, which counts as used now."""
        with self._lock:
            client = self._clients.pop(session_id, None)
            if client is not None:
                self._clients[session_id] = client
            return client

    def end(self, session_id: str) -> bool:
        """End a session; whether there was one."""
        with self._lock:
            client = self._clients.pop(session_id, None)
        if client is not None:
            client.close()
        return client is not None

    def close(self) -> None:
        """End all."""
        for session_id in list(self._clients):
            self.end(session_id)
