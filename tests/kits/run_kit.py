"""One run with all its actors and a real journal in this process, on an inproc hub."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from actor_kit import PATIENCE
from journal_kit import a_run

from voidbus.actors.artifact_store import ArtifactStore
from voidbus.actors.event import EventMaker
from voidbus.actors.journal import Journal
from voidbus.actors.leases import LeaseFile
from voidbus.actors.messages.journal import RunEnded
from voidbus.actors.messages.run_process import CancelWork
from voidbus.actors.messages.runs import (
    EventPage,
    EventPublished,
    InspectRun,
    ReadEvents,
    RunEvent,
    RunState,
    events_topic,
)
from voidbus.actors.run import RUN_PATH, SIDECAR_PATH, RunActor
from voidbus.actors.runtime.actor import Actor
from voidbus.actors.runtime.policy import ChildPolicy, Restart
from voidbus.actors.runtime.supervisor import ChildSpec, actor_child
from voidbus.actors.runtime.system import System
from voidbus.actors.sidecar import SidecarActor, SidecarDesk
from voidbus.actors.vm import VmActor
from voidbus.actors.workloads.conductor import MachineRequest
from voidbus.actors.workloads.make import machines_at_once, make_workload
from voidbus.sidecar.state import SidecarState
from voidbus.spec.policy import Policy
from voidbus.spec.run import RunSpec
from voidbus.transport.access import inproc_endpoints
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.message import Message
from voidbus.transport.topics import Publication
from voidbus.vm.machine import Machine, MachineSpec, Mount
from voidbus.vm.process.machine import ProcessMachine

M = TypeVar("M", bound=Message)
RUN_ID = "r1"
_FIRST_EVENTS = 2
_numbers = count()


class Notes:
    """Takes what is told to an address, for the test to look at."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def deliver(self, delivery: Delivery) -> FaultReason | None:
        self.messages.append(delivery.message)
        return None


class House:
    """The supervisor's node with a journal, and one run on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.over = threading.Event()
        self.told_runs = Notes()
        self.told_telemetry = Notes()
        self._published: list[RunEvent] = []
        self._changed = threading.Condition()
        self.hub = Hub("supervisor", inproc_endpoints(f"house-{next(_numbers)}"))
        self.system = System(self.hub)
        self.hub.attach("runs", self.told_runs)
        self.hub.attach("telemetry", self.told_telemetry)
        self.hub.subscribe(events_topic(RUN_ID), self._take)
        self.journal = self.system.start(
            Journal, "journal", folder / "journal.sqlite", "supervisor/runs"
        )
        self.ask("journal", a_run(RUN_ID, events=_FIRST_EVENTS))
        self.leases = LeaseFile(folder / "leases.jsonl")
        self.artifacts = ArtifactStore(folder / "artifacts")
        self.desk: SidecarDesk | None = None
        self.run: RunActor

    def close(self) -> None:
        self.system.stop(PATIENCE)
        self.hub.close()
        self.leases.close()

    def start(
        self,
        spec: dict[str, Any],
        *,
        machine: type[Machine] = ProcessMachine,
        sidecar: type[SidecarActor] = SidecarActor,
        input_text: str | None = None,
        grace: float = 10.0,
        host_env: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> None:
        """Start the run's actors, as its process does."""
        run_spec = RunSpec.model_validate(spec)
        children = []
        if run_spec.agent is not None and run_spec.agent.messaging.enabled:
            state = SidecarState(execution_id=RUN_ID, candidate_id=RUN_ID)
            self.desk = SidecarDesk(state)
            policy = ChildPolicy(SIDECAR_PATH, Restart.TRANSIENT, stop_timeout=6.0)
            children.append(
                actor_child(self.system, policy, sidecar, self.desk, run_id=RUN_ID, owner=RUN_PATH)
            )
        policy_of_run = fields.pop("policy", None) or Policy(max_stage_retries=0)

        def make_vm(path: str, request: MachineRequest) -> ChildSpec:
            scratch = self.folder / path.replace("vm", "machine")
            scratch.mkdir()
            shares = tuple(
                Mount(self._share(share.name), share.guest, share.writable)
                for share in request.shares
            )
            return actor_child(
                self.system,
                ChildPolicy(path, Restart.TEMPORARY, stop_timeout=4.0),
                VmActor,
                machine,
                MachineSpec(RUN_ID, "machine", scratch, secrets.token_bytes(32), mounts=shares),
                owner=RUN_PATH,
                telemetry="supervisor/telemetry",
                leases=self.leases,
                directory=self.folder,
                reason="the test says so",
                artifacts=self.artifacts,
                stage=request.stage,
                model=request.model,
            )

        self.run = self.system.start(
            RunActor,
            RUN_PATH,
            tuple(children),
            events=EventMaker(RUN_ID, "mock", _FIRST_EVENTS),
            spool=self.folder / "spool.jsonl",
            journal="supervisor/journal",
            run_generation=1,
            make_vm=make_vm,
            make_workload=lambda conductor: make_workload(
                run_spec,
                conductor,
                run_id=RUN_ID,
                host_env=host_env or {},
                input_text=input_text,
                policy=policy_of_run,
            ),
            machines_at_once=machines_at_once(policy_of_run),
            desk=self.desk,
            default_grace=grace,
            on_over=self.over.set,
            **fields,
        )
        self.run.link_changed(True)

    def _share(self, name: str) -> Path:
        share = self.folder / "shares" / name
        share.mkdir(parents=True, exist_ok=True)
        return share

    # -- what a test asks ------------------------------------------------------------------

    def ask(self, path: str, message: Message) -> Message:
        ask = self.hub.ask(f"supervisor/{path}", message, timeout=PATIENCE, sender="test")
        return ask.result()

    def tell(self, path: str, message: Message, *, sender: str) -> None:
        self.hub.tell(f"supervisor/{path}", message, sender=sender)

    def cancel(self, reason: str = "enough", grace: float | None = None) -> None:
        self.ask(RUN_PATH, CancelWork(reason=reason, grace=grace))

    def crash(self, path: str) -> Actor:
        """Have an actor fail in its own thread."""
        actor = self.system.find(path)
        assert actor is not None

        def fail() -> None:
            raise RuntimeError("told to fail")

        actor.post(fail)
        return actor

    def events(self) -> list[RunEvent]:
        """All events, in order, which has to be without a gap."""
        events: list[RunEvent] = []
        while True:
            after = events[-1].seq if events else -1
            page = self.ask("journal", ReadEvents(run_id=RUN_ID, after=after, limit=1000))
            assert isinstance(page, EventPage)
            if not page.events:
                break
            events.extend(page.events)
        assert [event.seq for event in events] == list(range(len(events)))
        return events

    def types(self) -> list[str]:
        return [event.event_type for event in self.events()]

    def log(self, stage: str | None = None) -> list[str]:
        return [
            event.message
            for event in self.events()
            if event.event_type == "log.chunk" and stage in (None, event.stage_name)
        ]

    def wait_for(self, wanted: Callable[[RunEvent], bool]) -> RunEvent:
        """Wait for an event to be published."""
        found: list[RunEvent] = []

        def there() -> bool:
            found.extend(event for event in self._published if wanted(event))
            return bool(found)

        with self._changed:
            assert self._changed.wait_for(there, PATIENCE), [e.message for e in self._published]
        return found[0]

    def wait_type(self, event_type: str) -> RunEvent:
        return self.wait_for(lambda event: event.event_type == event_type)

    def wait_message(self, message: str) -> RunEvent:
        return self.wait_for(lambda event: event.message == message)

    def wait_over(self) -> RunState:
        """Wait for the end of the run's actors; what the journal has of it then."""
        assert self.over.wait(PATIENCE), "the run did not come to its end"
        state = self.ask("journal", InspectRun(run_id=RUN_ID))
        assert isinstance(state, RunState)
        if state.status.terminal:
            assert self.told_runs.messages == [RunEnded(run_id=RUN_ID, status=state.status)]
        return state

    def machine_pid(self) -> int:
        """The machine's process, as it was leased."""
        leased = (self.folder / "leases.jsonl").read_text().splitlines()
        return next(int(lease["pid"]) for lease in map(json.loads, leased) if "pid" in lease)

    def _take(self, publication: Publication) -> None:
        assert isinstance(publication.message, EventPublished)
        with self._changed:
            self._published.append(publication.message.event)
            self._changed.notify_all()


@contextlib.contextmanager
def a_house(folder: Path) -> Iterator[House]:
    house = House(folder)
    try:
        yield house
    finally:
        house.close()


def workflow(*steps: str) -> dict[str, Any]:
    """A workflow of `sh -c` steps, one after another, written as `name: script`."""
    made: list[dict[str, Any]] = []
    for text in steps:
        name, _, script = text.partition(":")
        made.append(
            {
                "name": name.strip(),
                "run": {"program": "sh", "args": ["-c", script.strip()]},
                "depends_on": [made[-1]["name"]] if made else [],
            }
        )
    return {
        "kind": "workflow",
        "name": "flow",
        "sandbox": {"mode": "mock"},
        "workflow": {"steps": made},
    }


def agent(*, messaging: bool = True, **environment: str) -> dict[str, Any]:
    """An agent that claudio plays."""
    return {
        "kind": "agent",
        "name": "scout",
        "sandbox": {"mode": "mock", "env": {"CLAUDIO_TURNS": "1", **environment}},
        "agent": {"prompt": "do it", "messaging": {"enabled": messaging}},
    }
