"""The spool: a run process's events on disk until the journal has them.

A line of JSON for each batch, written before it is sent. It survives the run process: whoever
cleans up after one that died reads from it what the journal never got. While the supervisor is
away, events wait here and not in memory.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from pydantic import ValidationError

from voidbus.actors.messages.journal import AppendEvents

# Batches kept in memory as well; older ones are read again from the file.
_TAIL_LIMIT = 256
# The file starts anew when everything in it is journaled and it has grown past this.
_REWIND_BYTES = 4 * 1024 * 1024
_LINE_LIMIT = 16 * 1024 * 1024


class Spool:
    """Batches in order: `add` at one end, `next` and `done` at the other. For one thread."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size
        self._read_at = 0
        self._tail: deque[tuple[int, AppendEvents]] = deque()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Batches the journal does not have yet."""
        return self._waiting

    def add(self, batch: AppendEvents) -> None:
        """Write a batch. Raises OSError when the disk is full; nothing was added then."""
        line = batch.to_json() + b"\n"
        written = os.write(self._fd, line)
        if written != len(line):
            os.ftruncate(self._fd, self._size)
            raise OSError(28, "no space left for the run's events")
        if len(self._tail) < _TAIL_LIMIT and self._tail_is_complete():
            self._tail.append((len(line), batch))
        self._size += len(line)
        self._waiting += 1

    def next(self) -> AppendEvents | None:
        """The oldest batch the journal doesn't have; None where it has all."""
        if not self._waiting:
            return None
        if not self._tail:
            self._fill()
        return self._tail[0][1]

    def done(self) -> None:
        """The batch that `next` gave is journaled."""
        length, _ = self._tail.popleft()
        self._read_at += length
        self._waiting -= 1
        if not self._waiting and self._size > _REWIND_BYTES:
            os.ftruncate(self._fd, 0)
            self._size = self._read_at = 0

    def close(self) -> None:
        os.close(self._fd)

    def _tail_is_complete(self) -> bool:
        """Whether memory holds all that waits, so that a new batch may follow in it."""
        return len(self._tail) == self._waiting

    def _fill(self) -> None:
        """Read batches again from the file, from the oldest that waits."""
        data = os.pread(self._fd, 1024 * 1024, self._read_at)
        while b"\n" not in data and len(data) < _LINE_LIMIT:
            more = os.pread(self._fd, 1024 * 1024, self._read_at + len(data))
            if not more:
                raise OSError(5, "the run's spool file was cut short")
            data += more
        for line in data.splitlines(keepends=True)[: data.count(b"\n")]:
            self._tail.append((len(line), AppendEvents.from_json(line)))


def read_leftovers(path: Path, run_id: str, after: int) -> list[AppendEvents]:
    """What a dead run process wrote and the journal lacks: batches with events after `after`.

    The file was written by a process that may have been killed while writing: it ends where it
    stops making sense.
    """
    batches: list[AppendEvents] = []
    expected = after + 1
    try:
        with path.open("rb") as file:
            while line := file.readline(_LINE_LIMIT):
                if not line.endswith(b"\n"):
                    break
                batch = AppendEvents.from_json(line)
                if batch.run_id != run_id:
                    break
                fresh = tuple(event for event in batch.events if event.seq >= expected)
                if fresh and fresh[0].seq != expected:
                    break
                if fresh or batch.artifacts or batch.outcome is not None:
                    batches.append(batch.model_copy(update={"events": fresh}))
                    expected += len(fresh)
    except (OSError, ValueError, ValidationError):
        pass
    return batches
