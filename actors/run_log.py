"""A run's log: what programs print, as events, line by line, within a budget."""

from __future__ import annotations

from collections.abc import Callable

from voidbus.actors.workloads.conductor import LineSplitter

# What one run may put into the journal as log lines. A program that prints for ever fills neither
# the disk nor a follower's terminal; what is cut is counted.
LOG_BYTES_LIMIT = 16 * 1024 * 1024
LINE_LIMIT = 8 * 1024

EmitLine = Callable[[str, str, str], None]


class RunLog:
    """Splits output into lines for `emit(stage, stream, line)`."""

    def __init__(self, emit: EmitLine, limit: int = LOG_BYTES_LIMIT) -> None:
        self._emit = emit
        self._left = limit
        self._splitters: dict[tuple[str, str], LineSplitter] = {}
        self.cut_bytes = 0

    def add(self, stage: str, stream: str, data: bytes) -> bool:
        """Log some bytes. True when this is the first that is cut."""
        cut_before = self.cut_bytes
        splitter = self._splitters.setdefault((stage, stream), LineSplitter(LINE_LIMIT))
        for line in splitter.feed(data):
            self._line(stage, stream, line)
        return not cut_before and self.cut_bytes > 0

    def flush(self, stage: str) -> None:
        """Log what came without an end of line."""
        for (known, stream), splitter in self._splitters.items():
            if known == stage:
                for line in splitter.flush():
                    self._line(stage, stream, line)

    def _line(self, stage: str, stream: str, line: bytes) -> None:
        cost = len(line) + 64
        if cost > self._left:
            self.cut_bytes += len(line)
            return
        self._left -= cost
        # A NUL in a line is legal text that no terminal and few databases like.
        self._emit(stage, stream, line.decode(errors="replace").replace("\0", "�"))
