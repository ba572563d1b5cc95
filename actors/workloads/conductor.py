"""The interface between a workload and the run that carries it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from voidbus.actors.messages.artifacts import StoredArtifact
from voidbus.actors.messages.runs import RunReport
from voidbus.actors.workloads.publication import StageOutput
from voidbus.sidecar.model_endpoint import ModelEndpoint
from voidbus.spec.run import SandboxSpec

Level = Literal["info", "warn", "error"]


@dataclass(frozen=True)
class Command:
    """A program to run in the guest. `timeout` in seconds; 0 is no limit. One in the `background`
    ends with its machine: a cancelled run neither tells it nor waits for it."""

    program: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    timeout: int = 0
    background: bool = False


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
    """How the workload came out: its report, or why there is none. `requires_output`: the run owes
    structured output, and is a failure without it; one that failed anyway has failed to publish.
    `reason` is its terminal reason."""

    success: bool
    report: RunReport | None
    error: str | None = None
    exit_code: int | None = None
    requires_output: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Share:
    """A directory that machines of one run share, by its name in that run."""

    name: str
    guest: str
    writable: bool


@dataclass(frozen=True)
class MachineRequest:
    """A machine a workload wants. `stage` is the one stage it is for, None for all of the run;
    `messaging`: its programs reach the run's sidecar; `model` is what they reach by a gateway;
    `agent` is the agent whose layer it has, `images` (reference, guest path) the images whose
    files it has."""

    sandbox: SandboxSpec
    stage: str | None = None
    shares: tuple[Share, ...] = ()
    messaging: bool = False
    model: ModelEndpoint | None = None
    agent: str | None = None
    images: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class KeptFile:
    """A file of a guest's that is kept. `content` is there unless it is too large to look at."""

    digest: str
    size_bytes: int
    media_type: str
    content: bytes | None


class GuestMachine(Protocol):
    """One machine that answers. Every callback comes later, and none once it is closed or lost."""

    @property
    def sidecar_url(self) -> str | None:
        """How its programs reach the run's sidecar, where they may."""

    @property
    def model_url(self) -> str | None:
        """How its programs reach their model, where there is a gateway to it."""

    def server_port(self, index: int) -> int:
        """The port for the guest's server of this number, counted from 0."""

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

    def keep_file(
        self, path: str, limit: int, then: Callable[[KeptFile | str | None], None]
    ) -> None:
        """Keep a file of the guest's, of `limit` bytes at most. `then` gets None where there is
        none, and a text that says why where it could not be kept."""

    def watch_file(
        self, path: str, on_change: Callable[[], None], on_failed: Callable[[str], None]
    ) -> None:
        """Call `on_change` whenever the file is complete anew, and at once where it is."""

    def close(self) -> None:
        """Stop it; nothing runs in it that is still wanted."""


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

    def open_machine(
        self,
        request: MachineRequest,
        on_ready: Callable[[GuestMachine], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Start a machine, as soon as the run may have one more. `on_lost` is called, with the
        reason, when it does not start or ends by itself."""

    def after_working(self, seconds: float, run: Callable[[], None]) -> None:
        """Call `run` in `seconds`, unless the run has come to its end by then."""

    def fetch_skill(self, url: str, then: Callable[[bytes | str], None]) -> None:
        """Fetch what is at `url`; `then` gets it, or why that can't be."""

    def kept(self, artifact: StoredArtifact) -> None:
        """List a file that is kept as this run's."""

    def stage_output(self, output: StageOutput) -> None:
        """What a completed stage left; what it comes to is decided at the run's end."""

    def publish_output(self, output: StageOutput, report: RunReport) -> None:
        """Publish this now, while the run goes on."""

    def finish(self, verdict: Verdict) -> None:
        """The workload is over."""


class Workload(ABC):
    """What a run does."""

    @abstractmethod
    def begin(self) -> None:
        """Start."""


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
