"""The end of what a guest wrote to its console."""

from __future__ import annotations

import threading

CONSOLE_BYTES = 64 * 1024


class ConsoleRing:
    """Keeps the last ``limit`` bytes it was given. Safe from any thread."""

    def __init__(self, limit: int = CONSOLE_BYTES) -> None:
        self._limit = limit
        self._data = bytearray()
        self._lock = threading.Lock()

    def add(self, data: bytes) -> None:
        with self._lock:
            self._data += data
            del self._data[: -self._limit]

    def value(self) -> bytes:
        with self._lock:
            return bytes(self._data)

    def last_lines(self, count: int) -> str:
        """The last lines in one, control characters dropped: for an error message."""
        text = self.value().decode(errors="replace")
        lines = ("".join(c for c in line if c.isprintable()).strip() for line in text.splitlines())
        return " | ".join([line for line in lines if line][-count:])
