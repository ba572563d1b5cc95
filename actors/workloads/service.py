"""Kind `agent`, mode `service`: an agent that goes on, and publishes its output file meanwhile."""

from __future__ import annotations

from voidbus.actors.messages.runs import RunReport
from voidbus.actors.workloads.agent import agent_report
from voidbus.actors.workloads.agent_program import (
    AgentEnd,
    AgentProgram,
    AgentSettings,
    Spending,
)
from voidbus.actors.workloads.conductor import (
    Conductor,
    GuestMachine,
    KeptFile,
    MachineRequest,
    Verdict,
    Workload,
)
from voidbus.actors.workloads.output import Collected, OutputCollector
from voidbus.actors.workloads.publication import StageOutput
from voidbus.actors.workloads.stage import Stage

EXITED = "service exited cleanly"
FAILED = "service exited with error"
CRASHED = "service crashed"
NOT_STARTED = "service failed to start"

# What changes more often is published once in this time (seconds): the guest decides how often.
REPUBLISH_SECONDS = 1.0
# Publications that are events; what follows is published without a word.
_UPDATE_EVENTS_LIMIT = 1000


class AgentService(Workload):
    """A service has no stages and no time limit. Whenever its output file is complete anew, it is
    published: at once, and again with its end."""

    def __init__(
        self,
        name: str,
        settings: AgentSettings,
        conductor: Conductor,
        *,
        machine: MachineRequest,
        outputs: OutputCollector,
        input_text: str | None,
    ) -> None:
        self._name = name
        self._settings = settings
        self._conductor = conductor
        self._request = machine
        self._outputs = outputs
        self._input = input_text
        self._stage = Stage(conductor, name, noun="service", group="g0", box=name)
        self._running = False
        self._collecting = False
        self._changed = False
        self._resting = False  # something was published just now
        self._published: str | None = None  # the digest of what was
        self._updates = 0
        self._end: AgentEnd | None = None

    def begin(self) -> None:
        self._conductor.open_machine(self._request, self._watch, self._lost)

    def _watch(self, machine: GuestMachine) -> None:
        """Watch first: what the program writes at once must not be missed."""
        machine.watch_file(
            self._settings.output_file,
            lambda: self._file_changed(machine),
            lambda why: self._stage.emit(
                "machine.warning",
                f"{self._settings.output_file} is published at the service's end only: {why}",
                level="warn",
            ),
        )
        program = AgentProgram(
            self._settings,
            self._conductor,
            self._stage,
            lambda end: self._ended(machine, end),
            servers=self._settings.servers(machine, self._conductor, self._stage),
            input_text=self._input,
            on_running=self._now_running,
        )
        program.start(machine)

    def _now_running(self) -> None:
        self._running = True

    def _lost(self, reason: str) -> None:
        why = CRASHED if self._running else NOT_STARTED
        self._conductor.finish(Verdict(False, None, reason, reason=why))

    # -- publishing ------------------------------------------------------------------------

    def _file_changed(self, machine: GuestMachine) -> None:
        self._changed = True
        if not self._collecting and not self._resting:
            self._collect(machine)

    def _collect(self, machine: GuestMachine) -> None:
        self._collecting, self._changed = True, False
        path = self._settings.output_file
        self._outputs.collect(machine, self._name, path, self._collected(machine))

    def _collected(self, machine: GuestMachine) -> Collected:
        def collected(output: StageOutput, file: KeptFile | None) -> None:
            self._collecting = False
            if file is not None and output.output is not None:
                self._publish(machine, output, file)
            if self._changed and (self._end is not None or not self._resting):
                self._collect(machine)
            elif self._end is not None:
                self._finish(self._end)

        return collected

    def _publish(self, machine: GuestMachine, output: StageOutput, file: KeptFile) -> None:
        first = self._published is None
        if self._published == file.digest:
            return
        self._published = file.digest
        self._resting = True
        self._conductor.after_working(REPUBLISH_SECONDS, lambda: self._rested(machine))
        self._conductor.publish_output(output, self._report(success=True))
        self._updates += 1
        if self._updates > _UPDATE_EVENTS_LIMIT:
            return
        said = f"{self._settings.output_file} is published"
        payload = {
            "stage": self._name,
            "size_bytes": file.size_bytes,
            "digest": file.digest,
            "structured": output.fault is None,
        }
        if first:
            self._stage.emit("run.output_ready", said, payload=payload)
        else:
            self._stage.emit("run.output_updated", said, payload=payload)

    def _rested(self, machine: GuestMachine) -> None:
        self._resting = False
        if self._changed and not self._collecting and self._end is None:
            self._collect(machine)

    # -- the end ---------------------------------------------------------------------------

    def _ended(self, machine: GuestMachine, end: AgentEnd) -> None:
        """Look once more: what was written last may not have been told of yet."""
        self._end = end
        if end.error is not None:
            self._finish(end)
        elif not self._collecting:
            self._collect(machine)
        else:
            self._changed = True

    def _finish(self, end: AgentEnd) -> None:
        why = EXITED
        if end.error is not None:
            why = CRASHED if end.crashed else FAILED if self._running else NOT_STARTED
        spent = Spending()
        spent.add(end)
        report = agent_report(self._name, end, spent, success=end.error is None)
        if self._published is not None:
            report = report.model_copy(update={"output": self._settings.output_file})
        self._conductor.finish(
            Verdict(
                end.error is None,
                report.model_copy(update={"kind": "service"}),
                end.error,
                exit_code=end.exit.exit_code,
                reason=why,
            )
        )

    def _report(self, *, success: bool) -> RunReport:
        """While it goes on there are no tokens to tell of; the output is the file's path."""
        return RunReport(
            name=self._name,
            kind="service",
            success=success,
            output=self._settings.output_file,
            stages=1,
        )
