"""The end of what a guest wrote to its console."""

from __future__ import annotations

import threading

_PANIC = "Kernel panic"  # kernel/panic.c

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
        """The last lines in one, control characters dropped: for an error message. Where a kernel
        panicked, its own words come first, as its stack would push them out."""
        text = self.value().decode(errors="replace")
        stripped = (
            "".join(c for c in line if c.isprintable()).strip() for line in text.splitlines()
        )
        lines = [line for line in stripped if line]
        panic = [line for line in lines[:-count] if _PANIC in line]
        return " | ".join([*panic[-1:], *lines[-count:]])
