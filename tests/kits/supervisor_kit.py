"""A real supervisor process in a directory of its own, and a client to drive it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self, TypeVar

from patience import SLOW

from voidbus.actors.messages.runs import (
    CancelRun,
    EventPage,
    EventPublished,
    InspectRun,
    ReadEvents,
    RunAccepted,
    RunEvent,
    RunState,
    StartRun,
    events_topic,
)
from voidbus.actors.messages.supervisor import InspectSupervisor, StopSupervisor, SupervisorState
from voidbus.transport.access import ipc_endpoints, socket_directory
from voidbus.transport.fault import BusError, FaultReason
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Message, Right
from voidbus.transport.topics import Publication

M = TypeVar("M", bound=Message)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATIENCE = 20.0 * SLOW

_SERVE = (
    "import os, sys; from voidbus.cli.serve import serve; "
    "sys.exit(serve(None, os.environ, {'state_dir': sys.argv[1]}))"
)


class Supervisor:
    """One state directory; the supervisor on it can be started, killed and started again."""

    def __init__(self, state_dir: Path, **environment: str) -> None:
        self.state_dir = state_dir
        # On a socket of its own: the place where clients look is the user's.
        api = {"VOIDBUS_API__LISTEN": f"unix://{state_dir}.api"}
        self.environment = {**os.environ, **api, **environment}
        self.process: subprocess.Popen[bytes] | None = None
        self.client: Client | None = None

    def start(self) -> Self:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE, str(self.state_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        return self

    @property
    def log_path(self) -> Path:
        return self.state_dir.with_name(self.state_dir.name + ".log")

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def connect(self, right: Right = Right.OPERATE) -> Client:
        return Client(self.state_dir, right)

    def kill(self) -> None:
        """SIGKILL: no goodbye, no cleaning up."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self) -> None:
        """Stop politely, else by force; whatever run processes are left die too."""
        if self.process is None:
            return
        if self.process.poll() is None:
            with contextlib.suppress(BusError, TimeoutError), self.connect() as client:
                client.ask("root", StopSupervisor(runs="cancel", deadline=5.0))
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)


@contextlib.contextmanager
def running_supervisor(**environment: str) -> Iterator[Supervisor]:
    """A supervisor that is up, in a short-named directory (socket paths are limited)."""
    with tempfile.TemporaryDirectory(prefix="vb-") as folder:
        supervisor = Supervisor(Path(folder) / "state", **environment).start()
        try:
            yield supervisor
        finally:
            supervisor.close()


class Client:
    """A client's node with the questions tests ask. A context manager."""

    def __init__(self, state_dir: Path, right: Right = Right.OPERATE) -> None:
        endpoints = ipc_endpoints(socket_directory(state_dir))
        self.leaf = Leaf(
            f"client-{os.getpid()}-{time.monotonic_ns()}",
            endpoints.rights[right],
            topics_url=endpoints.topics,
        )
        if not self.leaf.wait_up(PATIENCE):
            self.leaf.close()
            raise TimeoutError(f"no supervisor on {state_dir}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leaf.close()

    def ask(self, actor: str, message: Message, *, timeout: float = PATIENCE) -> Message:
        """Ask an actor of the supervisor, or `node/path`. Raises BusError."""
        address = actor if "/" in actor else f"supervisor/{actor}"
        return self.leaf.ask(address, message, timeout=timeout).result()

    def ask_until(self, actor: str, message: Message) -> Message:
        """Ask again while there is no link or the other end is not there yet."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.ask(actor, message, timeout=5.0 * SLOW)
            except BusError as error:
                passing = (
                    FaultReason.LINK_LOST,
                    FaultReason.NO_SUCH_NODE,
                    FaultReason.NO_SUCH_ACTOR,
                )
                if error.reason not in passing or time.monotonic() > deadline:
                    raise
                threading.Event().wait(0.02)

    def start(self, file: Path | str, **fields: object) -> str:
        message = StartRun.model_validate({"file": str(file), **fields})
        accepted = self.ask_until("runs", message)
        assert isinstance(accepted, RunAccepted)
        return accepted.run_id

    def cancel(self, run_id: str, reason: str | None = None, grace: float | None = None) -> Message:
        cancel = CancelRun(run_id=run_id, reason=reason, grace=grace)
        return self.ask_until("runs", cancel)

    def state(self, run_id: str) -> RunState:
        state = self.ask_until("journal", InspectRun(run_id=run_id))
        assert isinstance(state, RunState)
        return state

    def supervisor(self) -> SupervisorState:
        state = self.ask_until("root", InspectSupervisor())
        assert isinstance(state, SupervisorState)
        return state

    def events(self, run_id: str) -> list[RunEvent]:
        events: list[RunEvent] = []
        while True:
            after = events[-1].seq if events else -1
            page = self.ask_until("journal", ReadEvents(run_id=run_id, after=after, limit=1000))
            assert isinstance(page, EventPage)
            if not page.events:
                return events
            events.extend(page.events)

    def wait_for(
        self, run_id: str, wanted: Callable[[RunEvent], bool], patience: float = PATIENCE
    ) -> RunEvent:
        """Wait for an event, journaled before or published after: no polling, no sleep."""
        seen = threading.Event()
        found: list[RunEvent] = []

        def take(publication: Publication) -> None:
            message = publication.message
            if isinstance(message, EventPublished) and wanted(message.event):
                found.append(message.event)
                seen.set()

        subscription = self.leaf.subscribe(events_topic(run_id), take)
        try:
            assert subscription.wait_ready(PATIENCE)
            deadline = time.monotonic() + patience
            while True:
                journaled = next((e for e in self.events(run_id) if wanted(e)), None)
                if journaled is not None:
                    return journaled
                # Published events end the wait at once; a supervisor that is killed meanwhile
                # publishes nothing, so the journal is looked at now and then too.
                if seen.wait(0.25):
                    return found[0]
                if time.monotonic() > deadline:
                    had = [(event.event_type, event.message) for event in self.events(run_id)]
                    raise TimeoutError(f"run {run_id} never had that event; it had {had}")
        finally:
            subscription.cancel()

    def wait_type(self, run_id: str, *event_types: str, patience: float = PATIENCE) -> RunEvent:
        return self.wait_for(run_id, lambda e: e.event_type in event_types, patience)

    def wait_end(self, run_id: str, patience: float = PATIENCE) -> RunState:
        self.wait_type(run_id, "run.finished", "run.failed", "run.cancelled", patience=patience)
        return self.state(run_id)


def agent_spec(folder: Path, name: str = "agent", **environment: str) -> Path:
    """A mock agent with messaging, played by claudio, which the environment directs."""
    lines = [
        "kind: agent",
        f"name: {name}",
        "sandbox:",
        "  mode: mock",
        "  env:",
        '    CLAUDIO_TURNS: "1"',
        *(f'    {key}: "{value}"' for key, value in environment.items() if key != "CLAUDIO_TURNS"),
        "llm: {provider: claude}",
        "agent:",
        "  prompt: do it",
        "  messaging: {enabled: true}",
    ]
    if "CLAUDIO_TURNS" in environment:
        lines[5] = f'    CLAUDIO_TURNS: "{environment["CLAUDIO_TURNS"]}"'
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def workflow_spec(folder: Path, *steps: str, name: str = "flow", extra: str = "") -> Path:
    """A mock workflow of `sh -c` steps written as `name: script`."""
    lines = ["kind: workflow", f"name: {name}", "sandbox: {mode: mock}", "workflow:", "  steps:"]
    for step in steps:
        step_name, _, script = step.partition(":")
        lines.append(f"    - name: {step_name.strip()}")
        lines.append(f"      run: {{program: sh, args: ['-c', {json.dumps(script.strip())}]}}")
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines) + "\n" + extra)
    return path


def processes_of(state_dir: Path) -> list[int]:
    """Pids of live processes whose command line or working directory is below `state_dir`."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            directory = str((folder / "cwd").readlink())
            dead = (folder / "stat").read_bytes().rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:
            continue
        inside = str(state_dir).encode() in command or directory.startswith(str(state_dir))
        if inside and not dead and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
