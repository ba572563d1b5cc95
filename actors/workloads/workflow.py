"""Kind `workflow`: steps on one machine, level by level, piped along their dependencies."""

from __future__ import annotations

from collections import deque

from voidbus.actors.messages.runs import RunReport
from voidbus.actors.workloads.conductor import (
    ERROR_LIMIT,
    OUTPUT_LIMIT,
    REPORT_LIMIT,
    Budget,
    Capture,
    Command,
    Conductor,
    Exit,
    GuestMachine,
    KeptFile,
    MachineRequest,
    Verdict,
    Workload,
    clip,
    first_timeout,
)
from voidbus.actors.workloads.output import OutputCollector
from voidbus.actors.workloads.publication import StageOutput
from voidbus.actors.workloads.stage import Stage
from voidbus.spec.levels import dependency_levels, output_step_of
from voidbus.spec.run import StepSpec, WorkflowSpec

# A step without a limit of its own, in a run without a policy (seconds).
DEFAULT_STEP_TIMEOUT = 1200
# What a workflow keeps of its steps' output at any time, for those that read it later (bytes).
HELD_LIMIT = 64 * 1024 * 1024
# Where a workflow leaves its structured output, and the second name it is kept under.
RESULT_FILE = "/workspace/result.json"
MAIN_STAGE = "main"
# A guest runs 128 programs at once and refuses more; the rest is room for what operators start.
STEPS_AT_ONCE = 64


class Workflow(Workload):
    """A level runs whole before the next; its steps at once, as many as the guest and the run's
    policy take.

    A step reads the output of its first dependency, or of `stdin_from` where that has finished. One
    that fails is started again as often as the policy says. The run succeeds as its output step
    does; steps that depend on a failed one are skipped.
    """

    def __init__(
        self,
        name: str,
        spec: WorkflowSpec,
        conductor: Conductor,
        *,
        machine: MachineRequest,
        outputs: OutputCollector,
        env: dict[str, str],
        input_text: str | None,
        stage_timeout: int | None,
        retries: int = 0,
        at_once: int = STEPS_AT_ONCE,
    ) -> None:
        self._name = name
        self._spec = spec
        self._conductor = conductor
        self._request = machine
        self._outputs = outputs
        self._env = env
        self._input = input_text
        self._stage_timeout = stage_timeout
        self._at_once = min(at_once, STEPS_AT_ONCE)
        self._levels = dependency_levels(spec.steps)
        self._output_step = output_step_of(spec)
        self._stages = {
            step.name: Stage(
                conductor, step.name, noun=f"step {step.name}", group=f"g{level}", retries=retries
            )
            for level, steps in enumerate(self._levels)
            for step in steps
        }
        self._machine: GuestMachine | None = None
        self._level = -1
        self._exits: dict[str, Exit] = {}
        self._skipped: set[str] = set()
        self._waiting: deque[StepSpec] = deque()
        self._running = 0
        self._budget = Budget(HELD_LIMIT)
        self._captures: dict[str, Capture] = {}
        self._last_reads = self._last_levels_that_read()

    def _last_levels_that_read(self) -> dict[str, int]:
        """By step, the last level that may read its output; the output step's is read last."""
        reads: dict[str, int] = {}
        for level, steps in enumerate(self._levels):
            for step in steps:
                for source in (step.run.stdin_from, *step.depends_on[:1]):
                    if source is not None:
                        reads[source] = level
        reads[self._output_step] = len(self._levels)
        return reads

    def begin(self) -> None:
        for steps in self._levels:
            for step in steps:
                self._stages[step.name].queued(step.depends_on)
        self._conductor.open_machine(self._request, self._ready, self._lost)

    def _ready(self, machine: GuestMachine) -> None:
        self._machine = machine
        self._next_level()

    def _lost(self, reason: str) -> None:
        self._conductor.finish(Verdict(False, None, reason))

    def _next_level(self) -> None:
        while True:
            self._level += 1
            if self._level >= len(self._levels):
                self._collect()
                return
            runnable = [step for step in self._levels[self._level] if not self._skip(step)]
            if runnable:
                break
        self._waiting.extend(runnable)
        self._start_some()

    def _start_some(self) -> None:
        """Start what waits in this level, as far as there is room for it."""
        while self._waiting and self._running < self._at_once:
            self._running += 1
            self._start(self._waiting.popleft())
        if self._waiting:
            return
        for name in [n for n in self._exits if self._last_reads.get(n, -1) <= self._level]:
            self._captures[name].release()

    def _skip(self, step: StepSpec) -> bool:
        """Skip a step whose dependency failed or was itself skipped."""
        broken = next(
            (
                name
                for name in step.depends_on
                if name in self._skipped or not self._exits[name].succeeded
            ),
            None,
        )
        if broken is None:
            return False
        self._skipped.add(step.name)
        self._stages[step.name].skipped(f'dependency "{broken}" failed')
        return True

    def _start(self, step: StepSpec) -> None:
        assert self._machine is not None
        self._stages[step.name].started()
        known = self._captures.get(step.name)
        if known is not None:  # of the attempt before
            known.release()
        capture = self._captures[step.name] = Capture(self._budget)

        def on_output(stream: str, data: bytes) -> None:
            capture.add(stream, data)
            self._conductor.log(step.name, stream, data)

        def on_exit(end: Exit) -> None:
            if capture.cut:
                self._conductor.emit(
                    "output.cut",
                    f"step {step.name} printed more than is kept for other steps and the report "
                    f"({OUTPUT_LIMIT} bytes of a step, {HELD_LIMIT} of all); they get the first",
                    level="warn",
                    stage=step.name,
                )
            self._ended(step, end)

        command = Command(
            step.run.program,
            tuple(step.run.args),
            self._env,
            self._stdin(step),
            self._timeout(step),
        )
        self._machine.execute(step.name, command, on_output, on_exit)

    def _stdin(self, step: StepSpec) -> bytes:
        for source in (step.run.stdin_from, *step.depends_on[:1]):
            if source is not None and source in self._exits:
                return self._captures[source]["stdout"]
        return b""

    def _timeout(self, step: StepSpec) -> int:
        if step.mode == "service":
            return 0
        return first_timeout(step.timeout_secs, self._stage_timeout, DEFAULT_STEP_TIMEOUT)

    def _ended(self, step: StepSpec, end: Exit) -> None:
        stage = self._stages[step.name]
        if end.succeeded:
            stage.completed(end)
        else:
            stage.failed(end, self._why(step.name, end))
            # Its place stays taken: it is still this step that runs.
            if stage.retry(lambda: self._start(step)):
                return
        self._exits[step.name] = end
        self._running -= 1
        if self._running or self._waiting:
            self._start_some()
        else:
            self._next_level()

    def _collect(self) -> None:
        """Keep what the output step left; where there is no such file, it left none."""
        end = self._exits.get(self._output_step)
        if end is None or not end.succeeded or self._machine is None:
            self._finish()
            return

        def collected(output: StageOutput, _: KeptFile | None) -> None:
            self._conductor.stage_output(output)
            self._finish()

        self._outputs.collect(
            self._machine,
            self._output_step,
            RESULT_FILE,
            collected,
            also_as=MAIN_STAGE if self._output_step != MAIN_STAGE else None,
        )

    def _finish(self) -> None:
        end = self._exits.get(self._output_step)
        success = end is not None and end.succeeded
        kept = self._captures[self._output_step]["stdout"] if end else b""
        output = kept.decode(errors="replace")
        if self._input:
            output = f"{self._input}\n{output}"
        report = RunReport(
            name=self._name,
            kind="workflow",
            success=success,
            output=clip(output, REPORT_LIMIT),
            stages=len(self._exits) + len(self._skipped),
        )
        error = None
        if not success:
            why = "it was skipped because a step it depends on failed"
            if end:
                why = self._why(self._output_step, end)
            error = f"output step {self._output_step} did not succeed: {why}"
        self._conductor.finish(
            Verdict(
                success,
                report,
                error,
                exit_code=end.exit_code if end else None,
                requires_output=self._spec.output_step is not None and report.stages <= 1,
            )
        )

    def _why(self, name: str, end: Exit) -> str:
        """Why a step that has ended failed."""
        if end.error:
            return end.error[:ERROR_LIMIT]
        text = self._captures[name]["stderr"].decode(errors="replace").strip()[-2000:]
        return f"Command failed with exit code {end.exit_code}" + (f": {text}" if text else "")
