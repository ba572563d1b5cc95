"""A run's log: what programs print, as events, line by line, within a budget."""

from __future__ import annotations

from collections.abc import Callable

from voidbus.actors.workloads.conductor import LineSplitter

# What one run's log lines may take up in the journal. A program that prints for ever fills neither
# the disk nor a follower's terminal.
LOG_BYTES_LIMIT = 32 * 1024 * 1024
LINE_LIMIT = 8 * 1024
# A line is an event: its text twice (message and payload) and these bytes of JSON.
_EVENT_BYTES = 512

EmitLine = Callable[[str, str, str], None]


class RunLog:
    """Splits output into lines for `emit(stage, stream, line)`.

    `on_cut(stage)` is called once, at the first line that is over the budget; no line follows.
    """

    def __init__(
        self, emit: EmitLine, on_cut: Callable[[str], None], limit: int = LOG_BYTES_LIMIT
    ) -> None:
        self._emit = emit
        self._on_cut = on_cut
        self._left = limit
        self._splitters: dict[tuple[str, str], LineSplitter] = {}
        self.cut = False

    def add(self, stage: str, stream: str, data: bytes) -> None:
        """Log some bytes."""
        if self.cut:
            return
        splitter = self._splitters.setdefault((stage, stream), LineSplitter(LINE_LIMIT))
        for line in splitter.feed(data):
            self._line(stage, stream, line)

    def flush(self, stage: str) -> None:
        """Log what came without an end of line."""
        for known, stream in list(self._splitters):
            if known == stage:
                for line in self._splitters.pop((known, stream)).flush():
                    self._line(stage, stream, line)

    def flush_all(self) -> None:
        """Log what came without an end of line, of every stage."""
        for stage in {stage for stage, _ in self._splitters}:
            self.flush(stage)

    def _line(self, stage: str, stream: str, line: bytes) -> None:
        if self.cut:
            return
        self._left -= 2 * len(line) + _EVENT_BYTES
        if self._left < 0:
            self.cut = True
            self._on_cut(stage)
            return
        # A NUL in a line is legal text that no terminal and few databases like.
        self._emit(stage, stream, line.decode(errors="replace").replace("\0", "\ufffd"))
