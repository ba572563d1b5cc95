"""Kind `agent`, mode `task`: one agent program, a prompt, an output file."""

from __future__ import annotations

from voidbus.actors.messages.runs import RunReport
from voidbus.actors.workloads.agent_program import (
    AgentEnd,
    AgentProgram,
    AgentSettings,
    Spending,
)
from voidbus.actors.workloads.conductor import (
    REPORT_LIMIT,
    Conductor,
    Exit,
    GuestMachine,
    KeptFile,
    MachineRequest,
    Verdict,
    Workload,
    clip,
)
from voidbus.actors.workloads.mcp_servers import McpServers
from voidbus.actors.workloads.output import OutputCollector
from voidbus.actors.workloads.publication import StageOutput
from voidbus.actors.workloads.stage import Stage


class AgentTask(Workload):
    """One machine, the agent on it, its output. The stage is named as the run's specification.

    An agent that fails is started again on the same machine, as often as the run's policy says.
    """

    def __init__(
        self,
        name: str,
        settings: AgentSettings,
        conductor: Conductor,
        *,
        machine: MachineRequest,
        outputs: OutputCollector,
        input_text: str | None,
        retries: int = 0,
    ) -> None:
        self._name = name
        self._settings = settings
        self._conductor = conductor
        self._request = machine
        self._outputs = outputs
        self._input = input_text
        self._spent = Spending()
        self._servers: McpServers | None = None
        self._stage = Stage(conductor, name, noun="agent", group="g0", box=name, retries=retries)

    def begin(self) -> None:
        self._stage.queued()
        self._conductor.open_machine(self._request, self._start, self._lost)

    def _start(self, machine: GuestMachine) -> None:
        if self._servers is None:  # a later attempt finds them there
            self._servers = self._settings.servers(machine, self._conductor, self._stage)
        self._stage.started()
        program = AgentProgram(
            self._settings,
            self._conductor,
            self._stage,
            lambda end: self._ended(machine, end),
            servers=self._servers,
            input_text=self._input,
        )
        program.start(machine)

    def _lost(self, reason: str) -> None:
        self._conductor.finish(Verdict(False, None, reason))

    def _ended(self, machine: GuestMachine, end: AgentEnd) -> None:
        self._spent.add(end)
        if end.error is None:
            self._outputs.collect(
                machine,
                self._name,
                self._settings.output_file,
                lambda output, file: self._complete(end, output, file),
            )
            return
        self._stage.failed(end.exit, end.error)
        if self._stage.retry(lambda: self._start(machine)):
            return
        report = agent_report(self._name, end, self._spent, success=False)
        self._conductor.finish(
            Verdict(False, report, end.error, exit_code=end.exit.exit_code, requires_output=True)
        )

    def _complete(self, end: AgentEnd, output: StageOutput, file: KeptFile | None) -> None:
        # With a result that is no error the agent succeeded, whatever its exit code.
        self._stage.completed(Exit(0, None, end.exit.duration_ms))
        self._conductor.stage_output(output)
        report = agent_report(self._name, end, self._spent, success=True, file=file)
        self._conductor.finish(
            Verdict(True, report, exit_code=end.exit.exit_code, requires_output=True)
        )


def agent_report(
    name: str, end: AgentEnd, spent: Spending, *, success: bool, file: KeptFile | None = None
) -> RunReport:
    """What an agent came to: its own words, or where it had none its output file's beginning."""
    return RunReport(
        name=name,
        kind="agent",
        success=success,
        output=clip(end.said.result or text_of(file), REPORT_LIMIT),
        stages=1,
        total_cost_usd=spent.total_cost_usd,
        input_tokens=spent.input_tokens,
        output_tokens=spent.output_tokens,
    )


def text_of(file: KeptFile | None) -> str:
    """The beginning of a kept file, as text."""
    content = (file.content if file is not None else None) or b""
    return content[:REPORT_LIMIT].decode(errors="replace")
