"""A real supervisor in a directory of its own, driven over the bus as the command line does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

from voidbus.actors.messages.runs import (
    CancelRun,
    EventPublished,
    InspectRun,
    ListRuns,
    RunAccepted,
    RunList,
    RunState,
    StartRun,
)
from voidbus.actors.messages.supervisor import InspectSupervisor, StopSupervisor, SupervisorState
from voidbus.transport.access import ipc_endpoints, socket_directory
from voidbus.transport.fault import BusError, FaultReason
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Message, Right
from voidbus.transport.topics import Publication

M = TypeVar("M", bound=Message)

SANDBOX = Path(__file__).resolve().parents[2] / "configs" / "sandbox.yaml"
PATIENCE = 60.0
TERMINAL = ("run.finished", "run.failed", "run.cancelled")

_SERVE = (
    "import os, sys; from voidbus.cli.serve import serve; "
    "sys.exit(serve(None, os.environ, {'state_dir': sys.argv[1]}))"
)


class EventLog:
    """Every event published, with the moment (time.monotonic) it arrived here."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._seen: dict[tuple[str, str], float] = {}

    def take(self, publication: Publication) -> None:
        now = time.monotonic()
        message = publication.message
        if isinstance(message, EventPublished):
            with self._news:
                self._seen.setdefault((message.event.run_id, message.event.event_type), now)
                self._news.notify_all()

    def wait(self, run_id: str, *types: str, timeout: float = PATIENCE) -> float:
        """When the first of `types` was published for the run."""
        with self._news:
            found = self._news.wait_for(lambda: self._moments(run_id, types), timeout)
        if not found:
            raise TimeoutError(f"run {run_id} had none of {', '.join(types)} in {timeout:g} s")
        return min(found)

    def _moments(self, run_id: str, types: tuple[str, ...]) -> list[float]:
        return [self._seen[run_id, each] for each in types if (run_id, each) in self._seen]


class Supervised:
    """A supervisor, and a client of it. A context manager; nothing is left when it closes."""

    def __init__(self, **environment: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="vb-")
        self.state_dir = Path(self._folder.name) / "state"
        self._environment = {
            **os.environ,
            "VOIDBUS_MAX_PARALLEL_RUNS": "256",
            "VOIDBUS_API__LISTEN": "off",
            **environment,
        }
        endpoints = ipc_endpoints(socket_directory(self.state_dir))
        self.leaf = Leaf(
            f"client-bench-{os.getpid()}",
            endpoints.rights[Right.OPERATE],
            topics_url=endpoints.topics,
        )
        self.events = EventLog()
        self.launch()
        try:
            if not self.leaf.wait_up(PATIENCE):
                raise TimeoutError("the supervisor did not come up")
            self._subscription = self.leaf.subscribe("events/", self.events.take)
            if not self._subscription.wait_ready(PATIENCE):
                raise TimeoutError("the supervisor does not publish")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def launch(self) -> float:
        """Execute a supervisor on the state directory; when (time.monotonic) it was executed."""
        with Path(self._folder.name, "log").open("ab") as log:
            moment = time.monotonic()
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVE, str(self.state_dir)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        return moment

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(BusError):
                stop = StopSupervisor(runs="cancel", deadline=20.0)
                self.leaf.ask("supervisor/root", stop, timeout=5.0).result()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        if self.process.poll() is None:
            self.kill()
        self.leaf.close()
        self._folder.cleanup()

    @property
    def log(self) -> str:
        return Path(self._folder.name, "log").read_text()

    # -- questions -------------------------------------------------------------------------

    def ask(self, dest: str, message: Message, wanted: type[M], timeout: float = PATIENCE) -> M:
        deadline = time.monotonic() + timeout
        while True:
            try:
                reply = self.leaf.ask(dest, message, timeout=timeout).result()
                break
            except BusError as error:
                # A supervisor that is starting takes links before its actors are there.
                passing = (FaultReason.NO_SUCH_ACTOR, FaultReason.LINK_LOST)
                if error.reason not in passing or time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
        if not isinstance(reply, wanted):
            raise TypeError(f"{dest} answered {reply.tag}")
        return reply

    def start(self, file: Path = SANDBOX) -> str:
        return self.ask("supervisor/runs", StartRun(file=str(file)), RunAccepted).run_id

    def start_ready(self, count: int, file: Path = SANDBOX) -> list[str]:
        """Start runs and wait until their machines are up."""
        runs = [self.start(file) for _ in range(count)]
        for run_id in runs:
            self.events.wait(run_id, "sandbox.ready", *TERMINAL)
        return runs

    def state(self, run_id: str) -> RunState:
        return self.ask("supervisor/journal", InspectRun(run_id=run_id), RunState)

    def list(self) -> RunList:
        return self.ask("supervisor/journal", ListRuns(state="active"), RunList)

    def cancel(self, run_id: str, grace: float | None = None) -> None:
        self.ask("supervisor/runs", CancelRun(run_id=run_id, grace=grace), Message)

    def describe(self) -> SupervisorState:
        return self.ask("supervisor/root", InspectSupervisor(), SupervisorState)

    def wait_adopted(self, count: int) -> int:
        """How many runs the supervisor says it adopted: `count`, or what it says at last."""
        deadline = time.monotonic() + PATIENCE
        while True:
            adopted = self.describe().adopted_runs
            if adopted == count or time.monotonic() > deadline:
                return adopted
            time.sleep(0.02)

    def run_process(self, run_id: str) -> int:
        pid = self.state(run_id).run_process
        if not pid:
            raise LookupError(f"run {run_id} has no process")
        return pid

    def zygote(self) -> int:
        """The pid of the supervisor's zygote."""
        return next(
            pid for pid in children(self.process.pid) if b"zygote_main" in command_line(pid)
        )


def kill(pid: int) -> float:
    """SIGKILL; the moment (time.monotonic) it was sent."""
    moment = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    return moment


def processes() -> Iterator[int]:
    """All live processes of this machine."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            yield int(folder.name)


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def children(parent: int) -> list[int]:
    """Live children of a process."""
    return [pid for pid in processes() if parent_and_state(pid)[0] == parent]


def descendants(ancestor: int) -> list[int]:
    """Live processes below a process, itself not among them."""
    parents = {pid: parent_and_state(pid)[0] for pid in processes()}
    found: list[int] = []
    ring = [ancestor]
    while ring:
        ring = [pid for pid, parent in parents.items() if parent in ring]
        found.extend(ring)
    return found


def ignores(pid: int, number: signal.Signals) -> bool:
    """Whether a process ignores a signal (proc_pid_status(5), SigIgn)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    mask = next((int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:")), 0)
    return bool(mask >> (number - 1) & 1)


def parent_and_state(pid: int) -> tuple[int, str]:
    """From proc_pid_stat(5); (0, "X") where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0, "X"
    fields = text.rpartition(")")[2].split()
    return int(fields[1]), fields[0]


def below(directory: Path) -> list[int]:
    """Live processes that have `directory` in their command line or work under it."""
    found = []
    for pid in processes():
        try:
            place = str(Path(f"/proc/{pid}/cwd").readlink())
        except OSError:
            place = ""
        inside = place.startswith(str(directory)) or os.fsencode(directory) in command_line(pid)
        if inside and parent_and_state(pid)[1] not in "ZX" and pid != os.getpid():
            found.append(pid)
    return found
