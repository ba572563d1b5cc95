"""The run actor: one run from its machine's start to its outcome.

It supervises the VM actor and the sidecar actor, carries out what the workload asks for, numbers
the events and hands them to the journal. It never waits: a cancel is taken while a program runs,
while the machine boots and while the supervisor is away.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any, ClassVar

from voidbus.actors.event import EventMaker
from voidbus.actors.journal_writer import JournalWriter
from voidbus.actors.messages.actor import Accepted, Done
from voidbus.actors.messages.journal import RunOutcome, RunProgress
from voidbus.actors.messages.machine import (
    ExecEnded,
    ExecOutput,
    Execute,
    GuestFile,
    MachineEnded,
    MachineReady,
    ReadGuestFile,
    SidecarEventNoted,
    SidecarReady,
    SignalExec,
    StartMachine,
    WriteGuestFile,
)
from voidbus.actors.messages.run_process import CancelWork
from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.run_log import LOG_BYTES_LIMIT, RunLog
from voidbus.actors.runtime.actor import Place, Timer, handles
from voidbus.actors.runtime.policy import (
    ExitKind,
    ExitReason,
    StopAll,
    Strategy,
    SupervisorPolicy,
    SupervisorStoppingError,
)
from voidbus.actors.runtime.supervisor import ChildSpec, Supervisor
from voidbus.actors.sidecar import SidecarDesk
from voidbus.actors.stages import StageTable
from voidbus.actors.workloads.conductor import (
    ERROR_LIMIT,
    Command,
    Exit,
    Level,
    Verdict,
    Workload,
)
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault
from voidbus.transport.message import Message
from voidbus.vm.connect import connect_deadline

log = logging.getLogger("voidbus.actors")

RUN_PATH = "run"
VM_PATH = "vm"
SIDECAR_PATH = "sidecar"

# Protocol, "Handshake": what a start may take beyond the deadline for the guest's answer (seconds).
_ESTABLISH_SECONDS = 30.0
_FILE_ASK_TIMEOUT = 40.0
# The machine and the sidecar have this long to stop once nothing runs in them.
_STOP_TIMEOUT = 10.0
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
    """One run. `make_workload(conductor, sidecar_url)` is called when the machine answers."""

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
        make_workload: Callable[[RunActor, str | None], Workload],
        desk: SidecarDesk | None,
        default_grace: float,
        on_over: Callable[[], None],
        log_limit: int = LOG_BYTES_LIMIT,
    ) -> None:
        # The VM actor is started when everything it is given is there: the sidecar's address.
        super().__init__(place, POLICY, tuple(c for c in children if c.name != VM_PATH))
        self._vm = next(child for child in children if child.name == VM_PATH)
        self._machine_asked = False
        self.run_id = events.run_id
        self._events = events
        self._make_workload = make_workload
        self._workload: Workload | None = None
        self._desk = desk
        self._default_grace = default_grace
        self._on_over = on_over
        self._phase = Phase.STARTING
        self._verdict: Verdict | None = None
        self._cancel_reason: str | None = None
        self._grace_timer: Timer | None = None
        self._machine: str | None = None
        self._linked = False
        self._stages = StageTable()
        self._log = RunLog(self._log_line, self._log_cut, log_limit)
        self._exec_numbers = 0
        self._execs: dict[
            int, tuple[str, Callable[[str, bytes], None], Callable[[Exit], None]]
        ] = {}
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
            self._start_machine(None)

    @handles(SidecarReady)
    def on_sidecar_ready(self, message: SidecarReady, delivery: Delivery) -> None:
        if self._phase is Phase.STARTING and not self._machine_asked:
            self._start_machine(message.address)

    def _start_machine(self, sidecar: tuple[str, int] | None) -> None:
        self._machine_asked = True
        try:
            self.add_child(self._vm)
        except SupervisorStoppingError:
            return  # the sidecar failed too often meanwhile
        timeout = connect_deadline() + _ESTABLISH_SECONDS
        self._ask_vm(
            StartMachine(sidecar=sidecar, timeout=timeout),
            self._machine_started,
            timeout=timeout + 5.0,
        )

    def _machine_started(self, outcome: Message) -> None:
        if self._phase is not Phase.STARTING:
            return
        if not isinstance(outcome, MachineReady):
            self._give_up(f"the machine did not start: {_detail(outcome)}")
            return
        self._machine = outcome.machine
        self._phase = Phase.WORKING
        self.emit(
            "machine.started",
            f"machine {outcome.machine} is up; isolation: {outcome.isolation}; {outcome.reason}",
            level="warn" if outcome.isolation == "none" else "info",
            payload={
                "machine": outcome.machine,
                "isolation": outcome.isolation,
                "reason": outcome.reason,
            },
        )
        for warning in outcome.warnings:
            self.emit("machine.warning", f"the guest goes on without: {warning}", level="warn")
        self._report_progress()
        try:
            self._workload = self._make_workload(self, outcome.sidecar_url)
            self._workload.begin()
        except (OSError, ValueError) as error:  # a skill's file that can't be read
            self._give_up(f"the run could not begin: {error}")

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
        if self._stages.observe(event):
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

    def execute(
        self,
        stage: str,
        command: Command,
        on_output: Callable[[str, bytes], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        """Run a program on the machine."""
        self._exec_numbers += 1
        number = self._exec_numbers
        self._execs[number] = (stage, on_output, on_exit)
        execute = Execute(
            number=number,
            program=command.program,
            args=command.args,
            env=dict(command.env),
            stdin=command.stdin,
            timeout=command.timeout,
        )

        def accepted(outcome: Message) -> None:
            if isinstance(outcome, Fault):
                self._exec_ended(number, Exit(-1, outcome.detail))

        self._ask_vm(execute, accepted, timeout=30.0)

    def write_file(self, path: str, content: bytes, then: Callable[[str | None], None]) -> None:
        """Write a file in the guest."""

        def written(outcome: Message) -> None:
            if self._phase is Phase.WORKING:
                then(None if isinstance(outcome, Done) else _detail(outcome))

        self._ask_vm(WriteGuestFile(path=path, content=content), written, _FILE_ASK_TIMEOUT)

    def read_file(self, path: str, then: Callable[[bytes | None], None]) -> None:
        """Read a file in the guest."""

        def read(outcome: Message) -> None:
            if self._phase is Phase.WORKING:
                then(outcome.content if isinstance(outcome, GuestFile) else None)

        self._ask_vm(ReadGuestFile(path=path), read, _FILE_ASK_TIMEOUT)

    def finish(self, verdict: Verdict) -> None:
        """The workload is over: stop everything, then record the outcome."""
        if self._phase in (Phase.STARTING, Phase.WORKING):
            self._verdict = verdict
            self._stop_children()

    # -- what the machine says -------------------------------------------------------------

    @handles(ExecOutput)
    def on_exec_output(self, message: ExecOutput, delivery: Delivery) -> None:
        found = self._execs.get(message.number)
        if found is not None and self._phase in (Phase.WORKING, Phase.CANCELLING):
            found[1](message.stream, message.data)

    @handles(ExecEnded)
    def on_exec_ended(self, message: ExecEnded, delivery: Delivery) -> None:
        self._exec_ended(
            message.number, Exit(message.exit_code, message.error, message.duration_ms)
        )

    def _exec_ended(self, number: int, end: Exit) -> None:
        found = self._execs.pop(number, None)
        if found is None:
            return
        stage, _, on_exit = found
        self._log.flush(stage)
        if self._phase is Phase.WORKING:
            on_exit(end)
        elif self._phase is Phase.CANCELLING and not self._execs:
            self._stop_children()

    @handles(MachineEnded)
    def on_machine_ended(self, message: MachineEnded, delivery: Delivery) -> None:
        console = f"; its last words: {message.console.strip()}" if message.console else ""
        self._give_up(f"the machine ended: {message.reason}{console}")

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
            self._grace_timer = self.after(grace, self._stop_children)
        if self._phase not in (Phase.STARTING, Phase.WORKING):
            return
        self._cancel_reason = reason
        nothing_runs = self._phase is Phase.STARTING or not self._execs
        self._phase = Phase.CANCELLING
        self._report_progress()
        if nothing_runs:
            self._stop_children()
            return
        for number in self._execs:
            self._ask_vm(SignalExec(number=number, signal=signal.SIGTERM), lambda _: None, 10.0)
        seconds = self._default_grace if grace is None else grace
        self._grace_timer = self.after(seconds, self._stop_children)

    def _give_up(self, error: str) -> None:
        """The run can't go on."""
        if self._phase in (Phase.STARTING, Phase.WORKING):
            self._verdict = Verdict(False, None, error)
            self._stop_children()
        elif self._phase is Phase.CANCELLING:
            self._stop_children()

    def child_ended(self, name: str, generation: int, reason: ExitReason) -> None:
        if name == VM_PATH and reason.kind is ExitKind.FAULT:
            self._give_up(f"the VM actor failed: {reason.detail}")

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
        self._happened(StopAll(self.system.clock() + _STOP_TIMEOUT))

    def all_stopped(self, detail: str) -> None:
        """The machine is gone: only now is the run over."""
        if self._phase is Phase.FLUSHING:
            return
        for stage in {stage for stage, _, _ in self._execs.values()}:
            self._log.flush(stage)
        self._phase = Phase.FLUSHING
        outcome = self._cancelled() if self._cancel_reason is not None else self._ended_by_itself()
        intents = tuple(self._desk.state.peek()) if self._desk is not None else ()
        self._writer.progress(self._progress())
        self._writer.commit(outcome.model_copy(update={"intents": intents}))
        self._writer.when_flushed(self._over)
        # While there is no supervisor nobody takes them; the spool keeps them for the next one.
        self.after(_FLUSH_TIMEOUT if self._linked else _UNLINKED_FLUSH_TIMEOUT, self._over)

    def _over(self) -> None:
        self.end(ExitReason(ExitKind.NORMAL, "the run is over"))

    def _cancelled(self) -> RunOutcome:
        reason = self._cancel_reason or "run marked cancelled"
        self._end_stages("run cancelled")
        self.emit("run.cancelled", f"run cancelled: {reason}", level="warn")
        return RunOutcome(status=RunStatus.CANCELLED, terminal_reason=reason)

    def _ended_by_itself(self) -> RunOutcome:
        verdict = self._verdict or Verdict(False, None, "the run stopped without a result")
        error = (verdict.error or "execution reported unsuccessful result")[:ERROR_LIMIT]
        self._end_stages(error)
        self.emit("log.closed", "stdout stream closed", stream="stdout")
        if verdict.success:
            self.emit("run.finished", "run completed")
            return RunOutcome(
                status=RunStatus.SUCCEEDED, report=verdict.report, exit_code=verdict.exit_code
            )
        self.emit("run.failed", f"run failed: {error}", level="error")
        return RunOutcome(
            status=RunStatus.FAILED,
            error=error,
            report=verdict.report,
            exit_code=verdict.exit_code,
        )

    def _end_stages(self, error: str) -> None:
        """End the stages that the end of the run interrupts."""
        for stage, state in self._workload.cancelled() if self._workload else []:
            self._stages.cancel(self.emit, stage, state, error=error)

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
        return RunProgress(
            machine=self._machine,
            active_stage_count=self._stages.active,
            active_microvm_count=int(
                self._machine is not None and self._phase is not Phase.FLUSHING
            ),
            stage_states=self._stages.states,
            cancelling=self._phase is Phase.CANCELLING,
        )

    def _report_progress(self) -> None:
        self._writer.progress(self._progress())

    def _ask_vm(self, message: Message, then: Callable[[Message], None], timeout: float) -> None:
        self.ask(f"{self.system.node.name}/{VM_PATH}", message, then, timeout=timeout)


def _detail(outcome: Message) -> str:
    return outcome.detail if isinstance(outcome, Fault) else f"unexpected {outcome.tag}"
