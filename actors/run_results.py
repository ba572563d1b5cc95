"""What a run leaves: its stages, its outputs, and what they come to at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from voidbus.actors.event import EventMaker, timestamp
from voidbus.actors.messages.artifacts import ArtifactPublication
from voidbus.actors.messages.journal import RunOutcome
from voidbus.actors.messages.runs import RunEvent, RunReport, RunStatus
from voidbus.actors.stages import StageTable
from voidbus.actors.workloads.conductor import ERROR_LIMIT, Verdict
from voidbus.actors.workloads.publication import StageOutput, manifest_of, publish

End = tuple[RunEvent, RunOutcome]
"""The last event of a run, and what is recorded of it."""


class RunResults:
    """Of one run. `emit` records an event of it, as Conductor.emit."""

    def __init__(self, events: EventMaker, emit: Callable[..., None]) -> None:
        self._events = events
        self._emit = emit
        self._outputs: list[StageOutput] = []
        self.stages = StageTable()
        self.publication = ArtifactPublication()
        self.report: RunReport | None = None
        """Of a service that has published."""

    def add(self, output: StageOutput) -> None:
        """What a completed stage left; what it comes to is decided at the run's end."""
        self._outputs.append(output)

    def publish(self, output: StageOutput, report: RunReport) -> None:
        """Publish this now, while the run goes on."""
        self.publication = ArtifactPublication(
            status="published",
            published_at=timestamp(time.time_ns()),
            manifest=tuple(manifest_of(self._events.run_id, output)),
        )
        self.report = report

    def cancelled(self, reason: str) -> End:
        """The run was cancelled, and everything has stopped."""
        self._end_stages("run cancelled")
        self._decide_publication(Verdict(False, None))
        return (
            self._events.make("run.cancelled", f"run cancelled: {reason}", level="warn"),
            RunOutcome(status=RunStatus.CANCELLED, terminal_reason=reason, report=self.report),
        )

    def ended(self, verdict: Verdict) -> End:
        """The run has ended by itself, and everything has stopped."""
        verdict = self._decide_publication(verdict)
        error = (verdict.error or "execution reported unsuccessful result")[:ERROR_LIMIT]
        self._end_stages(error)
        self._emit("log.closed", "stdout stream closed", stream="stdout")
        if verdict.success:
            terminal = self._events.make("run.finished", "run completed")
        else:
            terminal = self._events.make("run.failed", f"run failed: {error}", level="error")
        return terminal, RunOutcome(
            status=RunStatus.SUCCEEDED if verdict.success else RunStatus.FAILED,
            error=None if verdict.success else error,
            terminal_reason=verdict.reason,
            report=verdict.report or self.report,
            exit_code=verdict.exit_code,
        )

    def _decide_publication(self, verdict: Verdict) -> Verdict:
        """The run's manifest; a run that succeeded without the output it owes has failed."""
        if self.report is not None:  # a service's is out already
            return verdict
        published = publish(
            self._events.run_id,
            self._outputs,
            required=verdict.requires_output,
            stages_ran=self.stages.states is not None,
            now=timestamp(time.time_ns()),
        )
        self.publication = published.publication
        if published.error is None or not verdict.success:
            return verdict
        return replace(
            verdict,
            success=False,
            error=published.error,
            reason=published.code,
            report=verdict.report and verdict.report.model_copy(update={"success": False}),
        )

    def _end_stages(self, error: str) -> None:
        """End the stages that the end of the run interrupts."""
        for stage in self.stages.running:
            self.stages.cancel(self._emit, stage, "started", error=error)
        for stage in self.stages.queued:
            self.stages.cancel(self._emit, stage, "queued", error=error)
