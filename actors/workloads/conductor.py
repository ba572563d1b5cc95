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
    """How a program ended. `error` says why where it was not by itself (timeout, no such program).

    `stdout` and `stderr` are what was written, cut at `OUTPUT_LIMIT`.
    """

    exit_code: int
    error: str | None = None
    duration_ms: int = 0
    stdout: bytes = b""
    stderr: bytes = b""

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


class Capture:
    """The first `OUTPUT_LIMIT` bytes of each stream."""

    def __init__(self) -> None:
        self._parts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

    def add(self, stream: str, data: bytes) -> None:
        part = self._parts.setdefault(stream, bytearray())
        part += data[: max(0, OUTPUT_LIMIT - len(part))]

    def __getitem__(self, stream: str) -> bytes:
        return bytes(self._parts.get(stream, b""))


class LineSplitter:
    """Bytes to lines without their ends. A line over `limit` bytes is cut into several."""

    def __init__(self, limit: int = 64 * 1024) -> None:
        self._limit = limit
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        while len(self._rest) >= self._limit:
            lines.append(self._rest[: self._limit])
            self._rest = self._rest[self._limit :]
        return [line.rstrip(b"\r") for line in lines]

    def flush(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest.rstrip(b"\r")] if rest else []
