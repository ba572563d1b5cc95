"""Kind `pipeline`: agents in stages, each box in a machine of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from voidbus.actors.messages.runs import RunReport
from voidbus.actors.workloads.agent import text_of
from voidbus.actors.workloads.agent_program import (
    AgentEnd,
    AgentProgram,
    AgentSettings,
    Spending,
)
from voidbus.actors.workloads.conductor import (
    ERROR_LIMIT,
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
from voidbus.actors.workloads.output import OutputCollector
from voidbus.actors.workloads.publication import StageOutput
from voidbus.actors.workloads.stage import Stage
from voidbus.spec.run import FanOutStage, PipelineSpec

# What a box gets of the one before (bytes): it travels in one message to the guest.
CARRY_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True)
class BoxPlan:
    """A box, ready to be started."""

    settings: AgentSettings
    machine: MachineRequest


@dataclass(frozen=True)
class BoxResult:
    """What a box came to: the agent's words and its output file."""

    end: AgentEnd
    file: KeptFile | None

    @property
    def text(self) -> str:
        return self.end.said.result

    @property
    def carry(self) -> str | None:
        """For the next stage: the output file, else the agent's words, else nothing."""
        content = self.file.content if self.file is not None else None
        carried = content[:CARRY_LIMIT].decode(errors="replace") if content else self.text
        return carried or None


def stages_of(spec: PipelineSpec) -> list[list[str]]:
    """The boxes of each stage, in order."""
    if not spec.stages:
        return [[box.name] for box in spec.boxes]
    return [
        list(stage.boxes) if isinstance(stage, FanOutStage) else [stage.name]
        for stage in spec.stages
    ]


class Pipeline(Workload):
    """A stage runs whole before the next; the boxes of one stage side by side.

    A box that fails is started again in a new machine, as often as the run's policy says. The
    first that fails for good ends the pipeline; what had not begun is skipped.
    """

    def __init__(
        self,
        name: str,
        stages: list[list[str]],
        plans: Mapping[str, BoxPlan],
        conductor: Conductor,
        *,
        outputs: OutputCollector,
        input_text: str | None,
        retries: int = 0,
    ) -> None:
        self._name = name
        self._levels = stages
        self._plans = plans
        self._conductor = conductor
        self._outputs = outputs
        self._carry = input_text
        self._stages = {
            box: Stage(
                conductor, box, noun=f"box {box}", group=f"g{level}", box=box, retries=retries
            )
            for level, boxes in enumerate(stages)
            for box in boxes
        }
        self._level = -1
        self._results: dict[str, BoxResult] = {}
        self._failed: tuple[str, str, int | None] | None = None
        self._running: set[str] = set()
        self._spent = Spending()

    def begin(self) -> None:
        before: list[str] = []
        for boxes in self._levels:
            for box in boxes:
                self._stages[box].queued(before)
            before = boxes
        self._next_level()

    def _next_level(self) -> None:
        self._level += 1
        if self._level >= len(self._levels):
            self._finish()
            return
        boxes = self._levels[self._level]
        self._running = set(boxes)
        for box in boxes:
            self._open(box)

    def _open(self, box: str) -> None:
        attempt = _Attempt(self, box)
        self._conductor.open_machine(self._plans[box].machine, attempt.ready, attempt.lost)

    # -- one box ---------------------------------------------------------------------------

    def ready(self, box: str, machine: GuestMachine, on_end: Callable[[AgentEnd], None]) -> None:
        """The box's machine answers: run its agent there."""

        def ended(end: AgentEnd) -> None:
            self._spent.add(end)
            on_end(end)

        stage, settings = self._stages[box], self._plans[box].settings
        stage.started()
        AgentProgram(
            settings,
            self._conductor,
            stage,
            ended,
            servers=settings.servers(machine, self._conductor, stage),
            input_text=self._carry,
        ).start(machine)

    def succeeded(self, box: str, machine: GuestMachine, end: AgentEnd) -> None:
        """Keep its output while its machine is there."""

        def collected(output: StageOutput, file: KeptFile | None) -> None:
            self._results[box] = BoxResult(end, file)
            self._stages[box].completed(Exit(0, None, end.exit.duration_ms))
            self._conductor.stage_output(output)
            machine.close()
            self._box_over(box)

        self._outputs.collect(machine, box, self._plans[box].settings.output_file, collected)

    def failed(self, box: str, error: str, exit_: Exit) -> None:
        stage = self._stages[box]
        stage.failed(exit_, error)
        if self._failed is None and stage.retry(lambda: self._try_again(box)):
            return
        self._failed = self._failed or (box, error[:ERROR_LIMIT], exit_.exit_code)
        self._box_over(box)

    def _try_again(self, box: str) -> None:
        if self._failed is None:
            self._open(box)
        else:  # another box of the stage failed for good meanwhile
            self._box_over(box)

    def _box_over(self, box: str) -> None:
        self._running.discard(box)
        if self._running:
            return
        if self._failed is not None:
            self._give_up()
            return
        results = [self._results[each] for each in self._levels[self._level]]
        if len(results) == 1:
            self._carry = results[0].carry
        else:  # in the order declared, not that of completion
            self._carry = json.dumps([result.text for result in results])
        self._next_level()

    # -- the end ---------------------------------------------------------------------------

    def _give_up(self) -> None:
        assert self._failed is not None
        box, error, exit_code = self._failed
        for boxes in self._levels[self._level + 1 :]:
            for later in boxes:
                self._stages[later].skipped(f'box "{box}" failed')
        report = self._report(success=False)
        self._conductor.finish(
            Verdict(
                False,
                report,
                f"box {box} failed: {error}",
                exit_code=exit_code,
                requires_output=True,
            )
        )

    def _finish(self) -> None:
        self._conductor.finish(
            Verdict(True, self._report(success=True), exit_code=0, requires_output=True)
        )

    def _report(self, *, success: bool) -> RunReport:
        return RunReport(
            name=self._name,
            kind="pipeline",
            success=success,
            output=clip(self._output(), REPORT_LIMIT),
            stages=len(self._results),
            total_cost_usd=self._spent.total_cost_usd,
            input_tokens=self._spent.input_tokens,
            output_tokens=self._spent.output_tokens,
        )

    def _output(self) -> str:
        """The words of the last box that succeeded, in the order declared."""
        done = [box for boxes in self._levels for box in boxes if box in self._results]
        if not done:
            return ""
        last = self._results[done[-1]]
        return last.text or text_of(last.file)


class _Attempt:
    """One try of one box: its machine may be lost at any time, and its end is told once."""

    def __init__(self, pipeline: Pipeline, box: str) -> None:
        self._pipeline = pipeline
        self._box = box
        self._over = False

    def ready(self, machine: GuestMachine) -> None:
        def on_end(end: AgentEnd) -> None:
            if self._over:
                return
            if end.error is None:
                self._pipeline.succeeded(self._box, machine, end)
                return
            self._over = True
            machine.close()
            self._pipeline.failed(self._box, end.error, end.exit)

        self._pipeline.ready(self._box, machine, on_end)

    def lost(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self._pipeline.failed(self._box, reason, Exit(-1))
