"""The interface between a workload and the run that carries it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from voidbus.actors.messages.runs import RunReport

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class Command:
    """A program to run in the guest. `timeout` in seconds; 0 is no limit."""

    program: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    timeout: int = 0


@dataclass(frozen=True)
class Exit:
    """How a program ended. `error` says why where it was not by itself: killed, not found."""

    exit_code: int
    error: str | None = None
    duration_ms: int = 0

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0 and self.error is None


@dataclass(frozen=True)
class Verdict:
    """How the workload came out: its report, or why there is none."""

    success: bool
    report: RunReport | None
    error: str | None = None
    exit_code: int | None = None


class Conductor(Protocol):
    """What a workload may ask for. Every callback comes later, never within the call."""

    def emit(
        self,
        event_type: str,
        message: str,
        *,
        level: Level = "info",
        payload: Mapping[str, Any] | None = None,
        stage: str | None = None,
        group: str | None = None,
        box: str | None = None,
    ) -> None:
        """Record an event."""

    def log(self, stage: str, stream: str, data: bytes) -> None:
        """Record output of a stage, line by line."""

    def execute(
        self,
        stage: str,
        command: Command,
        on_output: Callable[[str, bytes], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        """Run a program; `on_output` gets (stream, bytes) as they come."""

    def write_file(self, path: str, content: bytes, then: Callable[[str | None], None]) -> None:
        """Write a file in the guest; `then` gets the error, or None."""

    def read_file(self, path: str, then: Callable[[bytes | None], None]) -> None:
        """Read a file in the guest; `then` gets None where there is none."""

    def finish(self, verdict: Verdict) -> None:
        """The workload is over."""


class Workload(ABC):
    """What a run does. `begin` is called once the machine answers."""

    @abstractmethod
    def begin(self) -> None:
        """Start."""

    @abstractmethod
    def cancelled(self) -> list[tuple[str, str]]:
        """The stages that the cancel ends: (stage, `started` or `queued`), in order."""


# What is kept of a program's output for pipes and reports (bytes); the log has its own limit.
OUTPUT_LIMIT = 1024 * 1024
# What a report holds of it (bytes of UTF-8). A report travels in one message of 4 MiB at most, and
# JSON may spell a byte with six.
REPORT_LIMIT = 512 * 1024
# What is kept of the words an error comes with, which may be the guest's (characters).
ERROR_LIMIT = 4000


def first_timeout(*seconds: int | None) -> int:
    """The first that is set, most particular first. 0 is set: it is no limit."""
    return next((value for value in seconds if value is not None), 0)


def clip(text: str, limit: int) -> str:
    """The first `limit` bytes of a text, without a cut character."""
    data = text.encode(errors="replace")
    return text if len(data) <= limit else data[:limit].decode(errors="ignore")


@dataclass
class Budget:
    """Bytes that several captures may hold together."""

    left: int


class Capture:
    """The first `OUTPUT_LIMIT` bytes of each stream, or fewer where the budget is used up.

    `cut` is whether there was more.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self._parts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._budget = budget or Budget(2 * OUTPUT_LIMIT)
        self.cut = False

    def add(self, stream: str, data: bytes) -> None:
        part = self._parts.get(stream)
        if part is None:
            return
        room = min(OUTPUT_LIMIT - len(part), self._budget.left)
        self.cut = self.cut or len(data) > room
        kept = data[:room]
        part += kept
        self._budget.left -= len(kept)

    def release(self) -> None:
        """Forget what was kept, for others to use the budget."""
        for part in self._parts.values():
            self._budget.left += len(part)
            part.clear()

    def __getitem__(self, stream: str) -> bytes:
        return bytes(self._parts[stream])


class LineSplitter:
    """Bytes to lines without their ends. A line over `limit` bytes is cut into several."""

    def __init__(self, limit: int = 64 * 1024) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        *complete, rest = data.split(b"\n")
        lines: list[bytes] = []
        for part in complete:
            self._rest += part
            lines.extend(self._cut())
            lines.append(bytes(self._rest).rstrip(b"\r"))
            self._rest.clear()
        self._rest += rest
        lines.extend(self._cut())
        return lines

    def flush(self) -> list[bytes]:
        rest = bytes(self._rest).rstrip(b"\r")
        self._rest.clear()
        return [rest] if rest else []

    def _cut(self) -> list[bytes]:
        """Take what is over the limit, a line at a time, where characters end."""
        lines = []
        while len(self._rest) > self._limit:
            end = self._limit
            # A character of UTF-8 has at most three bytes after its first (RFC 3629, section 3).
            while end > max(1, self._limit - 3) and self._rest[end] & 0xC0 == 0x80:
                end -= 1
            lines.append(bytes(self._rest[:end]))
            del self._rest[:end]
        return lines
