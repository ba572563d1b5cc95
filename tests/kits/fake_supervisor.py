"""A supervisor for the commands' tests: a real hub on real sockets, with stubs for its actors.

It runs in the test's process, so a test decides what is answered, lost, or late.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from voidbus.actors.messages.actor import Accepted, ActorStatus, InspectSystem, SystemStatus
from voidbus.actors.messages.runs import (
    CancelAccepted,
    CancelRun,
    EventPage,
    EventPublished,
    InspectRun,
    ListRuns,
    ReadEvents,
    RunAccepted,
    RunEvent,
    RunList,
    RunReport,
    RunState,
    RunStatus,
    StartRun,
    events_topic,
)
from voidbus.actors.messages.sidecar import (
    IntentList,
    PushMessage,
    PutInbox,
    ReadIntents,
    SidecarState,
)
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.actors.messages.telemetry import HostSample, ReadTelemetry, Sample, TelemetryPage
from voidbus.sidecar.model import Intent
from voidbus.transport.access import ipc_endpoints, secure_directory, socket_directory
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.message import Message

STARTED = "2026-01-01T00:00:00Z"
ENDED = "2026-01-01T00:00:12.500000000Z"


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[19])


def event(run_id: str, seq: int, event_type: str, message: str = "", **more: Any) -> RunEvent:
    return RunEvent(
        ts_ms=1_767_225_600_000 + seq,
        event_type=event_type,
        message=message or event_type,
        run_id=run_id,
        seq=seq,
        event_id=f"{run_id}-{seq}",
        timestamp=f"2026-01-01T00:00:{seq % 60:02d}.250000000Z",
        event_type_v2=event_type,
        **more,
    )


class FakeSupervisor:
    """`answers` overrides what a message type is answered with, by a function of its delivery."""

    def __init__(self, state: Path, *, pid: int | None = None) -> None:
        self.state = state
        self.runs: dict[str, RunState] = {}
        self.events: dict[str, list[RunEvent]] = {}
        self.intents: dict[str, tuple[Intent, ...]] = {}
        self.asked: list[Message] = []
        self.answers: dict[type[Message], Callable[[Delivery], None]] = {}
        self.page_limit = 500
        self.root_status: dict[str, Any] = {}
        self.heard = threading.Condition()
        self._pid = pid or os.getpid()
        state.mkdir(parents=True, exist_ok=True)
        self.sockets = secure_directory(socket_directory(state))
        self.hub = self._open()
        self.record()

    def __enter__(self) -> FakeSupervisor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.hub.close()

    def _open(self) -> Hub:
        hub = Hub("supervisor", ipc_endpoints(self.sockets))
        for path in ("root", "runs", "journal", "telemetry", "system"):
            hub.attach(path, self)
        return hub

    def record(self, **changes: Any) -> None:
        """Write supervisor.json."""
        written = {
            "pid": self._pid,
            "start_time": start_time(self._pid),
            "version": "0.1.0",
            "sockets": str(self.sockets),
            "phase": "running",
        }
        (self.state / "supervisor.json").write_text(json.dumps(written | changes))

    def restart(self) -> None:
        """Go away and come back with what was journaled."""
        self.hub.close()
        self.hub = self._open()

    # -- runs ------------------------------------------------------------------------------

    def add_run(self, run_id: str, status: str = "running", **more: Any) -> RunState:
        state = RunState(
            id=run_id,
            status=RunStatus(status),
            file="/tmp/agent.yaml",
            started_at=STARTED,
            updated_at=STARTED,
            finished_at=ENDED if RunStatus(status).terminal else None,
            **{"name": "writer", "kind": "agent", "mode": "mock", "machine": "process"} | more,
        )
        self.runs[run_id] = state
        self.events.setdefault(run_id, [])
        return state

    def emit(
        self,
        run_id: str,
        event_type: str,
        message: str = "",
        *,
        publish: bool = True,
        **more: Any,
    ) -> RunEvent:
        """Journal an event and publish it; a run's last one ends the run."""
        made = event(run_id, len(self.events[run_id]), event_type, message, **more)
        ends = {
            "run.finished": RunStatus.SUCCEEDED,
            "run.failed": RunStatus.FAILED,
            "run.cancelled": RunStatus.CANCELLED,
        }
        changes: dict[str, Any] = {"last_seq": made.seq}
        if event_type in ends:
            changes |= {
                "status": ends[event_type],
                "finished_at": ENDED,
                "terminal_event_id": made.event_id,
                "terminal_reason": message or event_type,
            }
        self.runs[run_id] = self.runs[run_id].model_copy(update=changes)
        self.events[run_id].append(made)
        if publish:
            self.hub.publish(events_topic(run_id), EventPublished(event=made))
        return made

    def report(self, run_id: str, output: str) -> None:
        made = RunReport(
            name="writer",
            kind="agent",
            success=True,
            output=output,
            stages=1,
            total_cost_usd=0.0125,
            input_tokens=120,
            output_tokens=45,
        )
        self.runs[run_id] = self.runs[run_id].model_copy(update={"report": made})

    def wait_for(self, kind: type[Message], timeout: float = 10.0) -> Message:
        """The first message of this kind that was asked. Fails the test where none comes."""
        with self.heard:
            found = self.heard.wait_for(lambda: self._first(kind), timeout)
        assert found is not None, f"no {kind.__name__} within {timeout} s"
        return found

    def _first(self, kind: type[Message]) -> Message | None:
        return next((message for message in self.asked if isinstance(message, kind)), None)

    # -- what is asked ---------------------------------------------------------------------

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        message = delivery.message
        answer = self.answers.get(type(message), self._answer)
        answer(delivery)
        with self.heard:
            self.asked.append(message)
            self.heard.notify_all()
        return None

    def _answer(self, delivery: Delivery) -> None:
        message = delivery.message
        run_id = getattr(message, "run_id", None)
        if run_id is not None and run_id not in self.runs and not isinstance(message, StartRun):
            delivery.fail(FaultReason.NO_SUCH_ACTOR, f"there is no run {run_id}")
            return
        delivery.reply(self._reply(message))

    def _reply(self, message: Message) -> Message:  # noqa: C901 - a table of stubs
        match message:
            case ListRuns():
                chosen = [
                    run
                    for run in reversed(self.runs.values())
                    if message.state is None or run.status.terminal == (message.state == "terminal")
                ]
                return RunList(runs=tuple(chosen[: message.limit]), total=len(chosen))
            case InspectRun():
                return self.runs[message.run_id]
            case ReadEvents():
                return self._page(message)
            case StartRun():
                run_id = message.run_id or "run-new"
                self.add_run(run_id)
                self.emit(run_id, "run.started", "run created")
                return RunAccepted(run_id=run_id, attempt_id=1, state=RunStatus.RUNNING)
            case CancelRun():
                state = self.runs[message.run_id]
                if not state.status.terminal:
                    self.emit(message.run_id, "run.cancelled", message.reason or "cancelled")
                return CancelAccepted(
                    run_id=message.run_id,
                    state=state.status,
                    terminal_event_id=state.terminal_event_id,
                )
            case PutInbox():
                version = message.inbox.version
                return SidecarState(status="ok", buffer_depth=0, inbox_version=version or 1)
            case PushMessage():
                return SidecarState(status="ok", buffer_depth=0, inbox_version=2)
            case ReadIntents():
                return IntentList(
                    run_id=message.run_id, intents=self.intents.get(message.run_id, ())
                )
            case ReadTelemetry():
                sample = Sample(
                    seq=1,
                    timestamp_ms=1_767_225_600_000,
                    host=HostSample(rss_bytes=5 * 1024**2, cpu_percent=12.5),
                )
                return TelemetryPage(run_id=message.run_id, next_seq=1, samples=(sample,))
            case StopSupervisor():
                return Accepted(operation="stop")
            case InspectSystem():
                return self._system()
            case _:
                raise AssertionError(f"nobody expected {message}")

    def _page(self, message: ReadEvents) -> EventPage:
        found = [one for one in self.events[message.run_id] if one.seq > message.after]
        state = self.runs[message.run_id]
        return EventPage(
            run_id=message.run_id,
            events=tuple(found[: min(message.limit, self.page_limit)]),
            last_seq=state.last_seq,
            ended=state.status.terminal,
        )

    def _system(self) -> SystemStatus:
        def status(path: str, **more: Any) -> ActorStatus:
            return ActorStatus(
                **{
                    "path": path,
                    "kind": "Actor",
                    "generation": 1,
                    "state": "running",
                    "age": 75.0,
                    "depth": 1,
                    "control_depth": 1,
                    "limit": 100,
                    "head_age": 0.0,
                    "handled": 7,
                    "refused": 0,
                    "shed": 0,
                    "restarts": 0,
                    "last_fault": "",
                }
                | more
            )

        return SystemStatus(
            node="supervisor",
            pid=1234,
            threads=5,
            actors=(
                status("journal", restarts=2, last_fault="disk full"),
                status("root", **self.root_status),
                status("runs"),
                status("runs/one"),
            ),
            counters={},
        )
