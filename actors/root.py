"""The root supervisor: keeps the supervisor's own actors, and brings all of it to an end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.journal import CountRuns, RunCount, RunsStopped, StopRuns
from voidbus.actors.messages.supervisor import (
    InspectSupervisor,
    StopSupervisor,
    SupervisorState,
)
from voidbus.actors.runtime.actor import LATER, Place, handles
from voidbus.actors.runtime.policy import (
    ExitKind,
    ExitReason,
    StopAll,
    Strategy,
    SupervisorPolicy,
)
from voidbus.actors.runtime.supervisor import ChildSpec, Supervisor
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault
from voidbus.transport.message import Message

log = logging.getLogger("voidbus.actors")

ROOT_PATH = "root"

# journal, telemetry, runs, in this order: when the journal is started again, so is what relies on
# what it said.
POLICY = SupervisorPolicy(
    strategy=Strategy.REST_FOR_ONE,
    max_restarts=5,
    window=60.0,
    backoff_initial=0.1,
    backoff_max=5.0,
    backoff_factor=2.0,
    jitter=0.2,
    stable_after=30.0,
)

_STOP_ACTORS_SECONDS = 10.0


@dataclass(frozen=True)
class Identity:
    """What the supervisor says of itself."""

    version: str
    state_dir: str
    started_at: str


class Root(Supervisor):
    """`on_over(reason)` is called when everything below is stopped."""

    mailbox_limit = 1024
    control: ClassVar[frozenset[type[Message]]] = frozenset({StopSupervisor, RunsStopped})

    def __init__(
        self,
        place: Place,
        children: tuple[ChildSpec, ...],
        identity: Identity,
        on_over: Callable[[ExitReason], None],
    ) -> None:
        super().__init__(place, POLICY, children)
        self._identity = identity
        self._on_over = on_over
        self._stopping = False

    @handles(InspectSupervisor)
    def on_inspect_supervisor(self, message: InspectSupervisor, delivery: Delivery) -> object:
        def counted(outcome: Message) -> None:
            count = outcome if isinstance(outcome, RunCount) else RunCount(active=0, adopted=0)
            delivery.reply(
                SupervisorState(
                    pid=os.getpid(),
                    release=self._identity.version,
                    state_dir=self._identity.state_dir,
                    started_at=self._identity.started_at,
                    phase="stopping" if self._stopping else "running",
                    active_runs=count.active,
                    adopted_runs=count.adopted,
                )
            )

        self.ask("supervisor/runs", CountRuns(), counted, timeout=5.0)
        return LATER

    @handles(StopSupervisor)
    def on_stop_supervisor(self, message: StopSupervisor, delivery: Delivery) -> Accepted:
        self.stop_supervisor(message)
        return Accepted(operation="stop")

    def stop_supervisor(self, message: StopSupervisor) -> None:
        """Refuse new work and come to an end. A second call may only hurry the first."""
        self._stopping = True
        log.info("stopping: %s runs within %.0f s", message.runs, message.deadline)

        def answered(outcome: Message) -> None:
            if isinstance(outcome, Fault):  # it isn't up, so neither is any run of its
                self._stop_actors()

        self.ask(
            "supervisor/runs",
            StopRuns(mode=message.runs, deadline=message.deadline),
            answered,
            timeout=message.deadline + 2.0,
        )
        self.after(message.deadline + 2.0, self._stop_actors)

    @handles(RunsStopped)
    def on_runs_stopped(self, message: RunsStopped, delivery: Delivery) -> None:
        if message.left:
            log.info("%d runs go on without a supervisor", message.left)
        self._stop_actors()

    def on_stop_request(self, timeout: float) -> None:
        self._stop_actors()

    def _stop_actors(self) -> None:
        self._happened(StopAll(self.system.clock() + _STOP_ACTORS_SECONDS))

    def all_stopped(self, detail: str) -> None:
        self.end(ExitReason(ExitKind.SHUTDOWN, detail or "stopped"))

    def gave_up(self, reason: str) -> None:
        log.error("the supervisor's own actors keep failing: %s", reason)
        self.end(ExitReason(ExitKind.FAULT, reason))

    def on_stop(self) -> None:
        assert self.exit_reason is not None
        self._on_over(self.exit_reason)
