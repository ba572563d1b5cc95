"""A conductor that writes down what a workload asks for and answers when the test says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from voidbus.actors.workloads.conductor import Command, Exit, Level, Verdict


@dataclass
class Event:
    """What a workload emitted."""

    event_type: str
    message: str
    level: str
    payload: dict[str, Any]
    stage: str | None
    group: str | None
    box: str | None


@dataclass
class Started:
    """A program that was asked for and has not ended yet."""

    stage: str
    command: Command
    on_output: Callable[[str, bytes], None]
    on_exit: Callable[[Exit], None]


class FakeConductor:
    """Programs run until `end`; files are there at once, as `files` and `write_errors` say."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.logged: list[tuple[str, str, bytes]] = []
        self.running: list[Started] = []
        self.commands: dict[str, Command] = {}
        self.files: dict[str, bytes] = {}
        self.written: dict[str, bytes] = {}
        self.write_errors: dict[str, str] = {}
        self.verdicts: list[Verdict] = []
        self._calls: list[Callable[[], None]] = []

    # -- what a workload may ask for -------------------------------------------------------

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
        self.events.append(
            Event(event_type, message, level, dict(payload or {}), stage, group, box)
        )

    def log(self, stage: str, stream: str, data: bytes) -> None:
        self.logged.append((stage, stream, data))

    def execute(
        self,
        stage: str,
        command: Command,
        on_output: Callable[[str, bytes], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        self.commands[stage] = command
        self.running.append(Started(stage, command, on_output, on_exit))

    def write_file(self, path: str, content: bytes, then: Callable[[str | None], None]) -> None:
        def write() -> None:
            error = self.write_errors.get(path)
            if error is None:
                self.written[path] = content
            then(error)

        self._calls.append(write)

    def read_file(self, path: str, then: Callable[[bytes | None], None]) -> None:
        self._calls.append(lambda: then(self.files.get(path)))

    def finish(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    # -- what a test does ------------------------------------------------------------------

    def settle(self) -> None:
        """Answer everything about files."""
        while self._calls:
            self._calls.pop(0)()

    def end(
        self,
        stage: str,
        exit_code: int = 0,
        *,
        stdout: bytes = b"",
        stderr: bytes = b"",
        error: str | None = None,
        duration_ms: int = 5,
    ) -> None:
        """A program prints and ends."""
        started = next(s for s in self.running if s.stage == stage)
        self.running.remove(started)
        if stdout:
            started.on_output("stdout", stdout)
        if stderr:
            started.on_output("stderr", stderr)
        started.on_exit(Exit(exit_code, error, duration_ms))
        self.settle()

    @property
    def verdict(self) -> Verdict:
        assert len(self.verdicts) == 1, self.verdicts
        return self.verdicts[0]

    def stages_running(self) -> list[str]:
        return [started.stage for started in self.running]

    def types(self, stage: str | None = None) -> list[str]:
        return [e.event_type for e in self.events if stage is None or e.stage == stage]

    def event(self, event_type: str, stage: str | None = None) -> Event:
        found = [
            e
            for e in self.events
            if e.event_type == event_type and (stage is None or e.stage == stage)
        ]
        assert len(found) == 1, f"{event_type}: {found}"
        return found[0]
