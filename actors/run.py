"""The run actor: one run from its machine's start to its outcome.

It supervises the VM actor and the sidecar actor, carries out what the workload asks for, numbers
the events and hands them to the journal. It never waits: a cancel is taken while a program runs,
while the machine boots and while the supervisor is away.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any, ClassVar

from voidbus.actors.event import EventMaker
from voidbus.actors.fleet import Fleet, MakeVm
from voidbus.actors.journal_writer import JournalWriter
from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.artifacts import StoredArtifact
from voidbus.actors.messages.journal import RunProgress
from voidbus.actors.messages.machine import (
    ExecEnded,
    ExecOutput,
    GuestFileChanged,
    MachineEnded,
    MachineReady,
    SidecarEventNoted,
    SidecarReady,
)
from voidbus.actors.messages.run_process import CancelWork
from voidbus.actors.messages.runs import (
    ReadConsole,
    RunReport,
)
from voidbus.actors.run_log import LOG_BYTES_LIMIT, RunLog
from voidbus.actors.run_results import RunResults
from voidbus.actors.runtime.actor import LATER, Place, Refuse, Timer, handles
from voidbus.actors.runtime.policy import (
    ExitKind,
    ExitReason,
    StopAll,
    Strategy,
    SupervisorPolicy,
)
from voidbus.actors.runtime.supervisor import ChildSpec, Supervisor
from voidbus.actors.sidecar import SidecarDesk
from voidbus.actors.workloads.conductor import (
    GuestMachine,
    Level,
    MachineRequest,
    Verdict,
    Workload,
)
from voidbus.actors.workloads.publication import StageOutput
from voidbus.actors.workloads.skills import SKILL_LIMIT
from voidbus.sidecar.fetch import fetch_text
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason
from voidbus.transport.message import Message

log = logging.getLogger("voidbus.actors")

RUN_PATH = "run"
SIDECAR_PATH = "sidecar"

# The machine and the sidecar have this long to stop once nothing runs in them.
_STOP_TIMEOUT = 10.0
# Those of a cancelled run must have stopped this long after its grace. The machine gets half of it
# to end in order, and is killed then; what its programs left of the grace is for that too.
_BEYOND_GRACE = 5.0
# How long the end of a run waits for the journal while the supervisor is there to take it, and
# when it isn't: the spool has everything, and the next supervisor reads it.
_FLUSH_TIMEOUT = 10.0
_UNLINKED_FLUSH_TIMEOUT = 1.0

POLICY = SupervisorPolicy(
    strategy=Strategy.ONE_FOR_ONE,
    max_restarts=3,
    window=60.0,
    backoff_initial=0.1,
    backoff_max=2.0,
    backoff_factor=2.0,
    jitter=0.2,
    stable_after=30.0,
)


class Phase(Enum):
    """Where a run is. A cancel or an end in any phase leads to STOPPING."""

    STARTING = auto()
    WORKING = auto()
    CANCELLING = auto()
    STOPPING = auto()
    FLUSHING = auto()


class RunActor(Supervisor):
    """One run. `make_workload(conductor)` is called once the sidecar, if there is one, listens;
    `make_vm` makes the VM actors of the machines the workload opens."""

    mailbox_limit = 1024
    # The sidecar's notices are few, and must not be refused while output fills the mailbox.
    control: ClassVar[frozenset[type[Message]]] = frozenset(
        {CancelWork, SidecarReady, SidecarEventNoted}
    )

    def __init__(
        self,
        place: Place,
        children: tuple[ChildSpec, ...],
        *,
        events: EventMaker,
        spool: Path,
        journal: str,
        run_generation: int,
        make_vm: MakeVm,
        make_workload: Callable[[RunActor], Workload],
        machines_at_once: int,
        desk: SidecarDesk | None,
        default_grace: float,
        on_over: Callable[[], None],
        log_limit: int = LOG_BYTES_LIMIT,
    ) -> None:
        super().__init__(place, POLICY, children)
        self.run_id = events.run_id
        self._events = events
        self._make_workload = make_workload
        self._desk = desk
        self._default_grace = default_grace
        self._on_over = on_over
        self._phase = Phase.STARTING
        self._verdict: Verdict | None = None
        self._cancel_reason: str | None = None
        self._grace_timer: Timer | None = None
        self._cancelled_by = math.inf
        self._machine: str | None = None
        self._linked = False
        self._results = RunResults(events, self.emit)
        self._log = RunLog(self._log_line, self._log_cut, log_limit)
        self._fleet = Fleet(
            self,
            make_vm,
            at_once=machines_at_once,
            on_ready=self._machine_ready,
            on_changed=self._report_progress,
            on_exec_end=self._log.flush,
        )
        self._writer = JournalWriter(
            self,
            spool,
            run_id=self.run_id,
            generation=run_generation,
            journal=journal,
            on_rejected=self.abandon,
        )

    # -- from start to work ----------------------------------------------------------------

    def on_start(self) -> None:
        super().on_start()
        if self._desk is None:
            self._begin()

    @handles(SidecarReady)
    def on_sidecar_ready(self, message: SidecarReady, delivery: Delivery) -> None:
        self._fleet.sidecar = message.address
        if self._phase is Phase.STARTING:
            self._begin()

    def _begin(self) -> None:
        self._phase = Phase.WORKING
        try:
            self._make_workload(self).begin()
        except (OSError, ValueError) as error:  # a skill's file that can't be read
            self._give_up(f"the run could not begin: {error}")

    def _machine_ready(self, request: MachineRequest, ready: MachineReady) -> None:
        self._machine = ready.machine
        self.emit(
            "machine.started",
            f"machine {ready.machine} is up; isolation: {ready.isolation}; {ready.reason}",
            level="warn" if ready.isolation == "none" else "info",
            payload={
                "machine": ready.machine,
                "isolation": ready.isolation,
                "reason": ready.reason,
            },
            stage=request.stage,
        )
        for warning in ready.warnings:
            self.emit(
                "machine.warning",
                f"the guest goes on without: {warning}",
                level="warn",
                stage=request.stage,
            )

    # -- what the workload asks for (Conductor) --------------------------------------------

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
        stream: str | None = None,
    ) -> None:
        """Record an event: numbered, spooled, sent to the journal."""
        event = self._events.make(
            event_type,
            message,
            level=level,
            payload=payload,
            stage=stage,
            group=group,
            box=box,
            stream=stream,
        )
        if self._results.stages.observe(event):
            self._report_progress()
        self._writer.add(event)

    def log(self, stage: str, stream: str, data: bytes) -> None:
        """Record output of a stage."""
        self._log.add(stage, stream, data)

    def _log_cut(self, stage: str) -> None:
        self.emit(
            "log.cut",
            "this run has printed more than its log may hold; what follows is not kept",
            level="warn",
            stage=stage,
        )

    def _log_line(self, stage: str, stream: str, line: str) -> None:
        self.emit("log.chunk", line, stage=stage, stream=stream, payload={"data": line})

    def open_machine(
        self,
        request: MachineRequest,
        on_ready: Callable[[GuestMachine], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Start a machine, as soon as the run may have one more."""
        self._fleet.open(request, on_ready, on_lost)

    def after_working(self, seconds: float, run: Callable[[], None]) -> None:
        """Call `run` in `seconds`, unless the run has come to its end by then."""

        def due() -> None:
            if self._phase is Phase.WORKING:
                run()

        self.after(seconds, due)

    def fetch_skill(self, url: str, then: Callable[[bytes | str], None]) -> None:
        """Fetch what is at `url`; `then` gets it, or why that can't be."""

        def fetched(outcome: bytes | Exception) -> None:
            if self._phase is Phase.WORKING:
                then(str(outcome) if isinstance(outcome, Exception) else outcome)

        try:
            self.work(lambda: fetch_text(url, SKILL_LIMIT), fetched, name="fetch")
        except Refuse as refused:
            why = str(refused)
            self.post(lambda: then(why))

    def kept(self, artifact: StoredArtifact) -> None:
        """List a file that is kept as this run's."""
        self._writer.artifact(artifact)
        self.emit(
            "artifact.stored",
            f"{artifact.name or 'the output file'} is kept",
            payload=artifact.model_dump(),
            stage=artifact.stage,
        )

    def stage_output(self, output: StageOutput) -> None:
        """What a completed stage left; what it comes to is decided at the run's end."""
        self._results.add(output)

    def publish_output(self, output: StageOutput, report: RunReport) -> None:
        """Publish this now, while the run goes on."""
        self._results.publish(output, report)
        self._report_progress()

    def finish(self, verdict: Verdict) -> None:
        """The workload is over: stop everything, then record the outcome."""
        if self._phase in (Phase.STARTING, Phase.WORKING):
            self._verdict = verdict
            self._stop_children()

    # -- what the machines say -------------------------------------------------------------

    @handles(ExecOutput)
    def on_exec_output(self, message: ExecOutput, delivery: Delivery) -> None:
        if self._phase in (Phase.WORKING, Phase.CANCELLING):
            self._fleet.output(message)

    @handles(ExecEnded)
    def on_exec_ended(self, message: ExecEnded, delivery: Delivery) -> None:
        self._fleet.ended(message)
        if self._phase is Phase.CANCELLING and not self._fleet.stages_running:
            self._stop_children()

    @handles(GuestFileChanged)
    def on_file_changed(self, message: GuestFileChanged, delivery: Delivery) -> None:
        self._fleet.file_changed(delivery.sender.rpartition("/")[2], message.path)

    @handles(MachineEnded)
    def on_machine_ended(self, message: MachineEnded, delivery: Delivery) -> None:
        console = f"; its last words: {message.console.strip()}" if message.console else ""
        reason = f"the machine ended: {message.reason}{console}"
        if self._phase is Phase.CANCELLING and self._fleet.up <= 1:
            self._stop_children()
        else:
            self._fleet.machine_ended(delivery.sender.rpartition("/")[2], reason)

    @handles(ReadConsole)
    def on_read_console(self, message: ReadConsole, delivery: Delivery) -> object:
        """Of the machine that was started last."""
        path = self._fleet.newest
        if path is None:
            raise Refuse("no machine is up", FaultReason.NO_SUCH_ACTOR)
        address = f"{self.system.node.name}/{path}"
        self.ask(address, message, delivery.reply, timeout=5.0)
        return LATER

    @handles(SidecarEventNoted)
    def on_sidecar_event(self, message: SidecarEventNoted, delivery: Delivery) -> None:
        if self._phase is Phase.FLUSHING:
            return
        refused = message.kind == "intent_rejected"
        self.emit(
            f"sidecar.{message.kind}",
            message.kind.replace("_", " "),
            level="warn" if refused else "info",
            payload=message.fields,
        )

    # -- cancel and failure ----------------------------------------------------------------

    @handles(CancelWork)
    def on_cancel(self, message: CancelWork, delivery: Delivery) -> Accepted:
        self.cancel(message.reason, message.grace)
        return Accepted(operation=f"cancel {self.run_id}")

    def cancel(self, reason: str, grace: float | None) -> None:
        """Signal what runs, wait out the grace, stop the machine. For this actor's thread."""
        if self._phase is Phase.CANCELLING and grace is not None and self._grace_timer is not None:
            self._grace_timer.cancel()  # asked again, with less patience
            self._begin_grace(grace)
        if self._phase not in (Phase.STARTING, Phase.WORKING):
            return
        self._cancel_reason = reason
        anything_runs = self._fleet.terminate()
        self._phase = Phase.CANCELLING
        self._report_progress()
        self._begin_grace(self._default_grace if grace is None else grace)
        if not anything_runs:
            self._stop_children()

    def _begin_grace(self, seconds: float) -> None:
        self._cancelled_by = self.system.clock() + seconds + _BEYOND_GRACE
        self._grace_timer = self.after(seconds, self._stop_children)

    def _give_up(self, error: str) -> None:
        """The run can't go on."""
        if self._phase in (Phase.STARTING, Phase.WORKING):
            self._verdict = Verdict(False, None, error)
            self._stop_children()
        elif self._phase is Phase.CANCELLING:
            self._stop_children()

    def child_ended(self, name: str, generation: int, reason: ExitReason) -> None:
        if name != SIDECAR_PATH:
            fault = reason.detail if reason.kind is ExitKind.FAULT else None
            self._fleet.child_ended(name, fault)

    def gave_up(self, reason: str) -> None:
        self._verdict = self._verdict or Verdict(False, None, f"the run's actors failed: {reason}")
        self._phase = Phase.STOPPING
        self.all_stopped(reason)

    def on_stop_request(self, timeout: float) -> None:
        self.cancel("the run process was asked to stop", min(timeout, self._default_grace))

    def abandon(self, detail: str) -> None:
        """The supervisor does not know this run any more: end at once, recording nothing."""
        log.error("run %s is abandoned: %s", self.run_id, detail)
        self._phase = Phase.FLUSHING
        self.end(ExitReason(ExitKind.SHUTDOWN, f"abandoned: {detail}"))

    # -- the end ---------------------------------------------------------------------------

    def _stop_children(self) -> None:
        if self._phase in (Phase.STOPPING, Phase.FLUSHING):
            return
        if self._grace_timer is not None:
            self._grace_timer.cancel()
        self._phase = Phase.STOPPING
        self._fleet.working = False
        self._happened(StopAll(min(self.system.clock() + _STOP_TIMEOUT, self._cancelled_by)))

    def all_stopped(self, detail: str) -> None:
        """The machine is gone: only now is the run over."""
        if self._phase is Phase.FLUSHING:
            return
        self._log.flush_all()
        self._phase = Phase.FLUSHING
        if self._cancel_reason is not None:
            terminal, outcome = self._results.cancelled(
                self._cancel_reason or "run marked cancelled"
            )
        else:
            terminal, outcome = self._results.ended(
                self._verdict or Verdict(False, None, "the run stopped without a result")
            )
        intents = tuple(self._desk.state.peek()) if self._desk is not None else ()
        self._writer.progress(self._progress())
        self._writer.end(terminal, outcome.model_copy(update={"intents": intents}))
        self._writer.when_flushed(self._over)
        # While there is no supervisor nobody takes them; the spool keeps them for the next one.
        self.after(_FLUSH_TIMEOUT if self._linked else _UNLINKED_FLUSH_TIMEOUT, self._over)

    def _over(self) -> None:
        self.end(ExitReason(ExitKind.NORMAL, "the run is over"))

    def on_stop(self) -> None:
        self._writer.close()
        self._on_over()

    # -- inside ----------------------------------------------------------------------------

    def link_changed(self, up: bool) -> None:
        """Told by the bus; any thread."""
        self._linked = up
        if up:
            self.post(self._writer.link_up)

    def _progress(self) -> RunProgress:
        results = self._results
        return RunProgress(
            machine=self._machine,
            active_stage_count=results.stages.active,
            active_microvm_count=self._fleet.up,
            stage_states=results.stages.states,
            artifact_publication=results.publication,
            output_ready=results.report is not None,
            report=results.report,
            cancelling=self._phase is Phase.CANCELLING,
        )

    def _report_progress(self) -> None:
        self._writer.progress(self._progress())
