"""The runs actor: starts run processes, adopts those of a supervisor before, and sees them end.

Each run process is a temporary child: a run that lost its process failed, it is not run again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from voidbus.actors.admission import Admission, Admitted
from voidbus.actors.collector import Collector
from voidbus.actors.console_door import ConsoleDoor
from voidbus.actors.early_messages import EarlyMessages
from voidbus.actors.launch import Launch
from voidbus.actors.messages.actor import Accepted, Done, detail_of
from voidbus.actors.messages.journal import (
    ActiveRuns,
    CountRuns,
    LoadActive,
    NodeJoined,
    ProcessExited,
    ProcessRecord,
    RunCount,
    RunEnded,
    RunsStopped,
    StopRuns,
)
from voidbus.actors.messages.run_process import CancelWork
from voidbus.actors.messages.runs import (
    CancelAccepted,
    CancelRun,
    InspectRun,
    ReadConsole,
    RunState,
    RunStatus,
    StartRun,
    run_node,
)
from voidbus.actors.messages.sidecar import (
    AcknowledgeIntents,
    PushMessage,
    PutInbox,
    ReadIntents,
)
from voidbus.actors.messages.telemetry import TrackRun
from voidbus.actors.recovery import recover
from voidbus.actors.run import RUN_PATH
from voidbus.actors.run_record import RunRecord, grace_of
from voidbus.actors.run_spawn import spawn_run
from voidbus.actors.runtime.actor import LATER, Place, Refuse, handles
from voidbus.actors.runtime.exit_watcher import ExitWatcher
from voidbus.actors.runtime.policy import (
    ChildPolicy,
    ExitKind,
    ExitReason,
    Restart,
    Strategy,
    SupervisorPolicy,
)
from voidbus.actors.runtime.process import ProcessGoneError, ProcessHandle, ProcessIdentity
from voidbus.actors.runtime.process_child import ProcessChild
from voidbus.actors.runtime.spawned import SpawnedProcess, describe_returncode
from voidbus.actors.runtime.spawner import Spawner
from voidbus.actors.runtime.supervisor import Child, ChildSpec, Supervisor
from voidbus.actors.sidecar_door import SidecarDoor, SidecarRequest
from voidbus.spec.machines import MachinesConfig
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import BusError, FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.message import Message

log = logging.getLogger("voidbus.actors")

_ASK_TIMEOUT = 15.0
_SPAWN_TIMEOUT = 20.0
# Beyond the grace, a cancelled run has this long to stop its machine and write its end.
_CANCEL_MARGIN = 12.0
_RETRY_SECONDS = 1.0

POLICY = SupervisorPolicy(
    strategy=Strategy.ONE_FOR_ONE,
    max_restarts=0,  # temporary children are never restarted
    window=60.0,
    backoff_initial=0.0,
    backoff_max=0.0,
    backoff_factor=1.0,
    jitter=0.0,
    stable_after=0.0,
)


@dataclass(frozen=True)
class RunsSettings:
    """What the supervisor's configuration says about runs."""

    runs_dir: Path
    artifacts_dir: Path
    max_parallel: int
    adoption_deadline: float
    machines: MachinesConfig = field(default_factory=MachinesConfig)


class Runs(Supervisor):
    """One child process for each run."""

    mailbox_limit = 10_000
    control: ClassVar[frozenset[type[Message]]] = frozenset({CancelRun, StopRuns, ProcessExited})

    def __init__(
        self, place: Place, settings: RunsSettings, hub: Hub, spawner: Spawner, root: str
    ) -> None:
        super().__init__(place, POLICY)
        self._settings = settings
        self._hub = hub
        self._spawner = spawner
        self._root = root
        self._runs: dict[str, RunRecord] = {}
        # Until the runs are known that a supervisor before us started, a cancel would find nothing
        # to cancel, and say that it had.
        self._early = EarlyMessages()
        self._early_stops: list[Callable[[], None]] = []  # root's, which asks twice at most
        self._unreadable = False
        self._early_exits: dict[ProcessIdentity, int | None] = {}
        self._adopted = 0
        self._stopping: StopRuns | None = None
        self._admission = Admission(
            self,
            "supervisor/journal",
            active=self._runs,
            # One that has ended has no machine any more, and its process is about to exit.
            count_active=lambda: sum(not run.ended for run in self._runs.values()),
            limit=settings.max_parallel,
            on_admitted=self._admitted,
        )
        self._watcher = ExitWatcher("run-processes")
        self._door = SidecarDoor(self, "supervisor/journal")
        self._console_door = ConsoleDoor(self, settings.runs_dir)
        self._collector = Collector(self, settings.runs_dir, "supervisor/journal")

    def on_start(self) -> None:
        super().on_start()
        self._load()

    def on_stop(self) -> None:
        self._watcher.close()
        for run in self._runs.values():
            if run.child.handle is not None:
                run.child.handle.close()

    # -- adoption --------------------------------------------------------------------------

    def _load(self) -> None:
        self.ask("supervisor/journal", LoadActive(), self._adopt_all, timeout=_ASK_TIMEOUT)

    def _adopt_all(self, outcome: Message) -> None:
        if not isinstance(outcome, ActiveRuns):
            log.error("cannot read the journal: %s; trying again", detail_of(outcome))
            self._unreadable = True  # which must keep nobody from stopping
            self._stop_early()
            self.after(_RETRY_SECONDS, self._load)
            return
        self.skip_generations(outcome.last_generation)
        for state, process in outcome.runs:
            self._adopt(state, process)
        self._hub.open_work()
        self._early.end()
        self._stop_early()

    def _stop_early(self) -> None:
        stops, self._early_stops = self._early_stops, []
        for stop in stops:
            stop()

    def _adopt(self, state: RunState, process: ProcessRecord) -> None:
        """Take charge of a run that a supervisor before us started."""
        run = RunRecord(state.id, process.generation, self._child(state.id), grace_of(state))
        if state.cancelling:
            run.cancel_reason = "run marked cancelled"
        self._runs[state.id] = run
        self._hub.expect(
            run_node(state.id), bytes.fromhex(process.token_digest), process.generation
        )
        identity = ProcessIdentity(process.pid, process.start_time)
        self.adopt_child(self._spec(run), process.generation, run.child)
        if not process.pid:
            self._collect(run, "the supervisor ended before the run's process was started")
            return
        try:
            handle = ProcessHandle.adopt(identity)
        except ProcessGoneError:
            self._collect(run, f"its process {process.pid} ended while no supervisor was there")
            return
        self._adopted += 1
        run.identity = identity
        run.child.attach(handle)
        self._watcher.watch(handle, lambda _: self._tell_exit(identity, None))
        self._track(run)
        if not self._hub.joined(run_node(state.id)):
            run.adoption = self.after(
                self._settings.adoption_deadline, lambda: self._not_adopted(run)
            )

    def _not_adopted(self, run: RunRecord) -> None:
        log.error("run %s did not come back within the adoption deadline", run.run_id)
        run.adoption = None
        run.child.stop(0.0)

    def _tell_exit(self, identity: ProcessIdentity, returncode: int | None) -> None:
        """From any thread: a process has ended."""
        self._hub.tell(
            f"{self._hub.name}/{self.path}",
            ProcessExited(pid=identity.pid, start_time=identity.start_time, returncode=returncode),
        )

    @handles(NodeJoined)
    def on_joined(self, message: NodeJoined, delivery: Delivery) -> None:
        run = next((r for r in self._runs.values() if run_node(r.run_id) == message.node), None)
        if run is None:
            return
        if run.adoption is not None:
            run.adoption.cancel()
            run.adoption = None
        if run.cancel_reason is not None and not run.cancel_sent:
            self._send_cancel(run)

    # -- starting --------------------------------------------------------------------------

    @handles(StartRun)
    def on_start_run(self, message: StartRun, delivery: Delivery) -> object:
        return self._early.handle(delivery, lambda: self._begin(message, delivery))

    def _begin(self, message: StartRun, delivery: Delivery) -> object:
        self._admission.begin(message, delivery)
        return LATER

    def _admitted(self, admitted: Admitted) -> None:
        """A run is in the journal: start its process."""
        launch, run_id = admitted.launch, admitted.launch.run_id
        if launch.spec is None:
            self._fail_unstarted(launch, admitted.state)
            return
        run = RunRecord(run_id, admitted.generation, self._child(run_id), grace_of(admitted.state))
        self._runs[run_id] = run
        self._hub.expect(run_node(run_id), admitted.digest, admitted.generation)
        self.adopt_child(self._spec(run), admitted.generation, run.child)
        self._spawn(run, admitted)

    def _fail_unstarted(self, launch: Launch, state: RunState) -> None:
        """A bad specification, journaled as the run that failed for it."""
        recovered = recover(
            state.model_copy(update={"last_seq": len(launch.events) - 1}),
            launch.directory(self._settings.runs_dir),
            reason=launch.problem or "the specification is bad",
            cancel_reason=None,
        )
        self._collector.append(launch.run_id, recovered.batches, lambda: None)

    def _spawn(self, run: RunRecord, admitted: Admitted) -> None:
        settings = self._settings
        directory = admitted.launch.directory(settings.runs_dir)

        def spawn() -> SpawnedProcess:
            return spawn_run(
                self._spawner,
                self._hub,
                admitted,
                directory,
                settings.artifacts_dir,
                machines=settings.machines,
            )

        try:
            self.work(spawn, lambda outcome: self._spawned(run, outcome), name=run.run_id)
        except Refuse:
            self.after(0.02, lambda: self._spawn(run, admitted))

    def _spawned(self, run: RunRecord, outcome: SpawnedProcess | Exception) -> None:
        if isinstance(outcome, Exception):
            detail = outcome.fault.detail if isinstance(outcome, BusError) else str(outcome)
            self._collect(run, f"its process could not be started: {detail}")
            return
        run.identity = outcome.identity
        run.child.attach(outcome.handle)
        self._track(run)
        if outcome.identity in self._early_exits:
            self._exited(run, self._early_exits.pop(outcome.identity))

    # -- cancelling ------------------------------------------------------------------------

    @handles(CancelRun)
    def on_cancel_run(self, message: CancelRun, delivery: Delivery) -> object:
        return self._early.handle(delivery, lambda: self._cancel_one(message, delivery))

    def _cancel_one(self, message: CancelRun, delivery: Delivery) -> object:
        run = self._runs.get(message.run_id)
        if run is None or run.ended:
            self._answer_ended(message.run_id, delivery)
            return LATER
        if run.cancel_reason is None:
            self._cancel(run, message.reason or "run marked cancelled", message.grace)
        elif message.grace is not None and message.grace < run.cancel_grace:
            self._cancel(run, run.cancel_reason, message.grace)
            self._send_cancel(run)
        return CancelAccepted(run_id=run.run_id, state=RunStatus.RUNNING)

    def _cancel(self, run: RunRecord, reason: str, grace: float | None) -> None:
        run.cancel_reason = reason
        run.cancel_grace = run.grace if grace is None else grace
        if not run.exited:
            # The ladder's drain is four fifths of its time.
            run.child.stop((run.cancel_grace + _CANCEL_MARGIN) / 0.8)

    def _answer_ended(self, run_id: str, delivery: Delivery) -> None:
        def looked_up(outcome: Message) -> None:
            if isinstance(outcome, RunState):
                delivery.reply(
                    CancelAccepted(
                        run_id=run_id,
                        state=outcome.status,
                        terminal_event_id=outcome.terminal_event_id,
                    )
                )
            else:
                delivery.fail(FaultReason.NO_SUCH_ACTOR, detail_of(outcome))

        self.ask("supervisor/journal", InspectRun(run_id=run_id), looked_up, timeout=_ASK_TIMEOUT)

    def _child(self, run_id: str) -> ProcessChild:
        def ask_to_end(_seconds: float) -> None:
            run = self._runs[run_id]
            if run.cancel_reason is None:
                run.cancel_reason = "the supervisor stopped it"
            self._send_cancel(run)

        return ProcessChild(self, ask_to_end)

    def _send_cancel(self, run: RunRecord) -> None:
        """Tell the run actor; where it isn't on the bus yet, `on_joined` tells it."""
        if not self._hub.joined(run_node(run.run_id)):
            return

        def answered(outcome: Message) -> None:
            if isinstance(outcome, Accepted):
                run.cancel_sent = True
            elif run.run_id in self._runs and not run.ended:
                self.after(0.2, lambda: self._send_cancel(run))

        self.ask(
            f"{run_node(run.run_id)}/{RUN_PATH}",
            CancelWork(reason=run.cancel_reason or "run marked cancelled", grace=run.cancel_grace),
            answered,
            timeout=5.0,
        )

    # -- endings ---------------------------------------------------------------------------

    @handles(RunEnded)
    def on_run_ended(self, message: RunEnded, delivery: Delivery) -> None:
        run = self._runs.get(message.run_id)
        if run is None:
            return
        run.ended = True
        if run.exited:
            self._release(run)

    @handles(ProcessExited)
    def on_process_exited(self, message: ProcessExited, delivery: Delivery) -> None:
        identity = ProcessIdentity(message.pid, message.start_time)
        run = next((r for r in self._runs.values() if r.identity == identity), None)
        if run is not None:
            self._exited(run, message.returncode)
        elif len(self._early_exits) < 10_000:
            # It ended before the job that started it could say so.
            self._early_exits[identity] = message.returncode

    def _exited(self, run: RunRecord, returncode: int | None) -> None:
        if run.exited:
            return
        run.exited = True
        if run.ended:
            self._release(run)
        else:
            self._collect(run, f"its process ended: {describe_returncode(returncode)}")

    def _collect(self, run: RunRecord, reason: str) -> None:
        """The process is gone and the run has no outcome yet: find it, or make it."""
        run.exited = True

        def ended() -> None:
            run.ended = True
            self._release(run)

        self._collector.collect(run, reason, ended)

    def _release(self, run: RunRecord) -> None:
        """The run has ended and its process is gone: forget both."""
        if self._runs.pop(run.run_id, None) is None:
            return
        if run.adoption is not None:
            run.adoption.cancel()
            run.adoption = None
        run.child.gone()
        if run.child.stopped_by is not None:
            log.info("run %s was stopped: %s", run.run_id, run.child.stopped_by.outcome.value)
        self._hub.dismiss(run_node(run.run_id))
        self.tell("supervisor/telemetry", TrackRun(run_id=run.run_id, pid=0, start_time=0))
        self._collector.remove(run.run_id)
        self.report_end(run.run_id, run.generation, ExitReason(ExitKind.NORMAL))
        self._check_stopped()

    @handles(PutInbox, PushMessage, ReadIntents, AcknowledgeIntents)
    def on_sidecar_message(self, message: SidecarRequest, delivery: Delivery) -> object:
        return self._early.handle(delivery, lambda: self._to_sidecar(message, delivery))

    def _to_sidecar(self, message: SidecarRequest, delivery: Delivery) -> object:
        run = self._runs.get(message.run_id)
        self._door.pass_on(
            message,
            delivery,
            alive=run is not None and not run.ended,
            coming=lambda: run is not None and run.adoption is not None and not run.ended,
        )
        return LATER

    @handles(ReadConsole)
    def on_read_console(self, message: ReadConsole, delivery: Delivery) -> object:
        return self._early.handle(delivery, lambda: self._read_console(message, delivery))

    def _read_console(self, message: ReadConsole, delivery: Delivery) -> object:
        run = self._runs.get(message.run_id)
        self._console_door.pass_on(message, delivery, alive=run is not None and not run.ended)
        return LATER

    # -- counting and stopping -------------------------------------------------------------

    @handles(CountRuns)
    def on_count(self, message: CountRuns, delivery: Delivery) -> RunCount:
        return RunCount(active=len(self._runs) + len(self._admission), adopted=self._adopted)

    @handles(StopRuns)
    def on_stop_runs(self, message: StopRuns, delivery: Delivery) -> object:
        self._admission.closed = True
        if message.mode == "leave" or self._early.over or self._unreadable:
            return self._stop_all(message)
        asked_at = self.system.clock()

        def stop() -> None:
            passed = self.system.clock() - asked_at
            left = max(0.0, message.deadline - passed)
            delivery.reply(self._stop_all(message.model_copy(update={"deadline": left})))

        self._early_stops.append(stop)
        return LATER

    def _stop_all(self, message: StopRuns) -> Done:
        first = self._stopping is None
        self._stopping = message
        if message.mode == "cancel":
            self._cancel_all(message.deadline)
        elif message.mode == "finish" and first:
            self.after(
                max(0.0, message.deadline * 0.7), lambda: self._cancel_all(0.3 * message.deadline)
            )
        self._check_stopped()
        return Done()

    def _cancel_all(self, seconds: float) -> None:
        """Cancel what is left, all at once, to be over within `seconds`."""
        for run in list(self._runs.values()):
            if run.cancel_reason is None:
                run.cancel_reason = "the supervisor was stopped"
                run.cancel_grace = min(run.grace, seconds * 0.5)
            run.child.stop(seconds)

    def _check_stopped(self) -> None:
        if self._stopping is None:
            return
        active = len(self._runs) + len(self._admission)
        if self._stopping.mode == "leave" or not active:
            self.tell(self._root, RunsStopped(left=active))

    def on_stop_request(self, timeout: float) -> None:
        """End this actor; the processes are left to the next one, or were ended before."""
        self.end(ExitReason(ExitKind.SHUTDOWN, "stopped"))

    # -- inside ----------------------------------------------------------------------------

    def _track(self, run: RunRecord) -> None:
        assert run.identity is not None
        self.tell(
            "supervisor/telemetry",
            TrackRun(run_id=run.run_id, pid=run.identity.pid, start_time=run.identity.start_time),
        )

    def _spec(self, run: RunRecord) -> ChildSpec:
        def never(
            _generation: int, _ready: Callable[[], None], _ended: Callable[[ExitReason], None]
        ) -> Child:
            raise RuntimeError("a run is not started again")

        return ChildSpec(ChildPolicy(run.run_id, Restart.TEMPORARY, stop_timeout=30.0), never)
