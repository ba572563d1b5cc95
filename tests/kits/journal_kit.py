"""Runs and events for tests of the journal and what stands round it."""

from __future__ import annotations

from voidbus.actors.event import EventMaker
from voidbus.actors.messages.journal import AppendEvents, CreateRun, ProcessRecord, RunOutcome
from voidbus.actors.messages.runs import RunState, RunStatus

NOW = "2026-01-01T00:00:00Z"


def a_run(run_id: str = "r1", *, generation: int = 1, events: int = 2) -> CreateRun:
    """A run to create, with its first events."""
    maker = EventMaker(run_id, "mock")
    return CreateRun(
        state=RunState(
            id=run_id,
            status=RunStatus.RUNNING,
            file="a.yaml",
            kind="agent",
            mode="mock",
            started_at=NOW,
            updated_at=NOW,
            generation=generation,
        ),
        process=ProcessRecord(generation=generation, token_digest="00" * 32),
        events=tuple(maker.make("run.started", f"event {n}") for n in range(events)),
    )


def a_batch(
    run_id: str = "r1",
    *,
    first: int,
    count: int = 1,
    generation: int = 1,
    outcome: RunOutcome | None = None,
) -> AppendEvents:
    """A batch of log lines; with an outcome, its last event is the terminal one."""
    maker = EventMaker(run_id, "mock", first)
    events = [maker.make("log.chunk", f"line {n}", stream="stdout") for n in range(count)]
    if outcome is not None:
        kind = "run.finished" if outcome.status is RunStatus.SUCCEEDED else "run.failed"
        events.append(maker.make(kind, "the end"))
    return AppendEvents(run_id=run_id, generation=generation, events=tuple(events), outcome=outcome)
