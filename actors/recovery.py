"""What is left of a run whose process is gone: its last events, its processes, its files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from voidbus.actors.console_file import put_by
from voidbus.actors.event import EventMaker
from voidbus.actors.kept_intents import read_kept
from voidbus.actors.leases import Leftovers, reap
from voidbus.actors.messages.journal import AppendEvents, RunOutcome, RunProgress
from voidbus.actors.messages.runs import RunEvent, RunState, RunStatus
from voidbus.actors.run_process import INTENTS_FILE, LEASE_FILE, LOG_FILE, SPOOL_FILE
from voidbus.actors.spool import read_leftovers
from voidbus.actors.stages import StageTable

# A run may have any number of stages that its end ends too; a batch is one message.
_EVENTS_AT_ONCE = 500


@dataclass(frozen=True)
class Recovered:
    """The batches that bring the journal to the run's end, in order, and what was cleaned up."""

    batches: tuple[AppendEvents, ...]
    leftovers: Leftovers


def recover(
    state: RunState,
    directory: Path,
    *,
    reason: str,
    cancel_reason: str | None,
    stage_events: Iterable[RunEvent] = (),
) -> Recovered:
    """Reap what the dead process left behind and work out how its run ended.

    `stage_events` are those the journal has. What the process spooled comes first. If its outcome
    is among it, that is the outcome; otherwise the run was cancelled, where that was asked for, or
    failed for `reason`, and the intents that waited are left to the journal. Blocks on the disk.
    """
    leftovers = reap(directory / LEASE_FILE, directory)
    last_words = _last_line(directory / LOG_FILE)
    if last_words:
        reason = f"{reason}; its log ends: {last_words}"
    batches = read_leftovers(directory / SPOOL_FILE, state.id, state.last_seq)
    if not batches or batches[-1].outcome is None:
        stages = StageTable(state.stage_states)
        for event in (*stage_events, *(event for batch in batches for event in batch.events)):
            stages.observe(event)
        *before, ending = _ending(state, batches, stages, leftovers, reason, cancel_reason)
        assert ending.outcome is not None
        # An outcome that was spooled has them already.
        outcome = ending.outcome.model_copy(update={"intents": read_kept(directory / INTENTS_FILE)})
        batches += [*before, ending.model_copy(update={"outcome": outcome})]
    return Recovered(
        tuple(b.model_copy(update={"generation": state.generation}) for b in batches), leftovers
    )


def _last_line(log: Path) -> str:
    """What a run process wrote last, for the operator who asks why it ended."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "")


def remove_directory(directory: Path) -> None:
    """Remove what an ended run had on disk, but for its machine's console."""
    put_by(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _ending(
    state: RunState,
    batches: list[AppendEvents],
    stages: StageTable,
    leftovers: Leftovers,
    reason: str,
    cancel_reason: str | None,
) -> list[AppendEvents]:
    """The batches that end it; the last has the terminal event and the outcome."""
    last_seq = next((b.events[-1].seq for b in reversed(batches) if b.events), state.last_seq)
    maker = EventMaker(state.id, state.mode, last_seq + 1)
    events: list[RunEvent] = []

    def emit(event_type: str, message: str, **fields: object) -> None:
        event = maker.make(event_type, message, **fields)  # type: ignore[arg-type]
        stages.observe(event)
        events.append(event)

    error = "run cancelled" if cancel_reason is not None else reason
    for stage in stages.running:
        stages.cancel(emit, stage, "started", error=error)
    for stage in stages.queued:
        stages.cancel(emit, stage, "queued", error=error)
    cleaned = {
        "processes_killed": leftovers.processes_killed,
        "paths_removed": leftovers.paths_removed,
    }
    if cancel_reason is not None:
        emit("run.cancelled", f"run cancelled: {cancel_reason}", level="warn", payload=cleaned)
        outcome = RunOutcome(status=RunStatus.CANCELLED, terminal_reason=cancel_reason)
    else:
        emit("run.failed", f"run failed: {reason}", level="error", payload=cleaned)
        outcome = RunOutcome(status=RunStatus.FAILED, error=reason, terminal_reason=reason)
    # What a service has published stays published.
    last = next((b.progress for b in reversed(batches) if b.progress), None)
    published = last or RunProgress(
        artifact_publication=state.artifact_publication,
        output_ready=state.output_ready,
        report=state.report,
    )
    *batches_before, last_events = [
        AppendEvents(
            run_id=state.id,
            generation=state.generation,
            events=tuple(events[at : at + _EVENTS_AT_ONCE]),
        )
        for at in range(0, len(events), _EVENTS_AT_ONCE)
    ]
    ending = last_events.model_copy(
        update={
            "progress": published.model_copy(
                update={
                    "machine": state.machine,
                    "stage_states": stages.states,
                    "cancelling": False,
                }
            ),
            "outcome": outcome.model_copy(update={"report": published.report}),
        }
    )
    return [*batches_before, ending]
