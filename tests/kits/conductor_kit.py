"""A conductor that writes down what a workload asks for and answers when the test says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from voidbus.actors.messages.artifacts import StoredArtifact
from voidbus.actors.messages.runs import RunReport
from voidbus.actors.workloads.conductor import (
    Command,
    Exit,
    GuestMachine,
    KeptFile,
    Level,
    MachineRequest,
    Verdict,
)
from voidbus.actors.workloads.publication import StageOutput


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


@dataclass
class Opened:
    """A machine that was asked for. It answers when the test says so."""

    request: MachineRequest
    on_ready: Callable[[GuestMachine], None]
    on_lost: Callable[[str], None]
    machine: FakeMachine
    closed: bool = False


class FakeConductor:
    """Programs run until `end`; files are there at once, as `files` and `write_errors` say.

    Machines answer at once, unless `patient`: then `settle` makes them, and so does the test.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.machines: list[Opened] = []
        self.outputs: list[StageOutput] = []
        self.published: list[tuple[StageOutput, RunReport]] = []
        self.stored: list[StoredArtifact] = []
        self.delays: list[float] = []
        self.later: list[Callable[[], None]] = []
        self.events: list[Event] = []
        self.logged: list[tuple[str, str, bytes]] = []
        self.running: list[Started] = []
        self.commands: dict[str, Command] = {}
        self.files: dict[str, bytes] = {}
        self.written: dict[str, bytes] = {}
        self.remote: dict[str, bytes] = {}
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

    def open_machine(
        self,
        request: MachineRequest,
        on_ready: Callable[[GuestMachine], None],
        on_lost: Callable[[str], None],
    ) -> None:
        opened = Opened(request, on_ready, on_lost, FakeMachine(self, len(self.machines)))
        self.machines.append(opened)
        if not self.patient:
            on_ready(opened.machine)

    def after_working(self, seconds: float, run: Callable[[], None]) -> None:
        self.delays.append(seconds)
        self.later.append(run)

    def fetch_skill(self, url: str, then: Callable[[bytes | str], None]) -> None:
        self.call(lambda: then(self.remote.get(url, f"{url} is not there")))

    def kept(self, artifact: StoredArtifact) -> None:
        self.stored.append(artifact)

    def stage_output(self, output: StageOutput) -> None:
        self.outputs.append(output)

    def publish_output(self, output: StageOutput, report: RunReport) -> None:
        self.published.append((output, report))

    def finish(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    # -- what a test does ------------------------------------------------------------------

    def pass_time(self) -> None:
        """What was to be done later is done now."""
        due, self.later = self.later, []
        for run in due:
            run()
        self.settle()

    def call(self, run: Callable[[], None]) -> None:
        """Have `settle` call this."""
        self._calls.append(run)

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

    def open_stages(self) -> list[tuple[str, str]]:
        """Stages that have not ended, in the order queued: (stage, `started` or `queued`)."""
        last: dict[str, str] = {}
        for event in self.events:
            if event.stage is not None and event.event_type.startswith("stage."):
                last[event.stage] = event.event_type.removeprefix("stage.")
        return [(stage, what) for stage, what in last.items() if what in ("queued", "started")]

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


class FakeMachine:
    """A machine of a fake conductor's; all machines have the same files."""

    def __init__(self, conductor: FakeConductor, number: int) -> None:
        self._conductor = conductor
        self._number = number
        self.sidecar_url: str | None = None
        self.model_url: str | None = None
        self.watches: dict[str, Callable[[], None]] = {}
        self.watch_error: str | None = None

    def execute(
        self,
        stage: str,
        command: Command,
        on_output: Callable[[str, bytes], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        self._conductor.commands[stage] = command
        self._conductor.running.append(Started(stage, command, on_output, on_exit))

    def server_port(self, index: int) -> int:
        return 8222 + index

    def write_file(self, path: str, content: bytes, then: Callable[[str | None], None]) -> None:
        def write() -> None:
            error = self._conductor.write_errors.get(path)
            if error is None:
                self._conductor.written[path] = content
            then(error)

        self._conductor.call(write)

    def keep_file(
        self, path: str, limit: int, then: Callable[[KeptFile | str | None], None]
    ) -> None:
        def keep() -> None:
            content = self._conductor.files.get(path)
            if content is None:
                then(None)
            elif len(content) > limit:
                then(f"{path}: over {limit} bytes")
            else:
                digest = hashlib.sha256(content).hexdigest()
                then(KeptFile(digest, len(content), "application/json", content))

        self._conductor.call(keep)

    def watch_file(
        self, path: str, on_change: Callable[[], None], on_failed: Callable[[str], None]
    ) -> None:
        self.watches[path] = on_change
        if self.watch_error is not None:
            error = self.watch_error
            self._conductor.call(lambda: on_failed(error))

    def close(self) -> None:
        self._conductor.machines[self._number].closed = True
