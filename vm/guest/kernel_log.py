"""The agent's own log: lines of the kernel's log, which the host reads on the console.

A line goes to ``/dev/kmsg`` (kernel documentation, ABI/testing/dev-kmsg). With ``quiet`` the
kernel shows only what is worse than a warning on the console, so steps cost nothing there
and faults are seen.
"""

from __future__ import annotations

import os

FATAL = 2  # KERN_CRIT, <linux/kern_levels.h>, as all of these
FAULT = 3  # KERN_ERR
STEP = 6  # KERN_INFO

LINE_BYTES = 900
"""Most bytes of one line; the kernel takes under 1000 with the prefix (LOG_LINE_MAX)."""


class KernelLog:
    """Writes lines. Before ``open`` they are kept; when there is no /dev/kmsg they go to
    standard error. Nothing here raises."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._kept: list[tuple[int, str]] = []

    def open(self, path: str = "/dev/kmsg") -> None:
        """Use the kernel's log from now on, also for the lines kept until now."""
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:
            self._fd = 2
        kept, self._kept = self._kept, []
        for level, text in kept:
            self._write(level, text)

    def step(self, text: str) -> None:
        """Something done, as it should be."""
        self._write(STEP, text)

    def fault(self, text: str) -> None:
        """Something that could not be done; the machine goes on."""
        self._write(FAULT, text)

    def fatal(self, text: str) -> None:
        """Why the machine ends."""
        if self._fd is None:
            self.open()
        self._write(FATAL, text)

    def _write(self, level: int, text: str) -> None:
        if self._fd is None:
            self._kept.append((level, text))
            return
        for line in text.splitlines() or [""]:
            data = f"guest-agent: {line}".encode(errors="replace")[:LINE_BYTES]
            prefix = b"" if self._fd == 2 else b"<%d>" % level
            try:
                os.write(self._fd, prefix + data + b"\n")
            except OSError:
                continue
