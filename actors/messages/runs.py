"""Runs: what operators ask of them, and what they look like.

Field names and spellings are those of the HTTP API, so that `--json` and HTTP say the same.
Times are RFC 3339 in UTC with `Z`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from voidbus.actors.messages.artifacts import ArtifactPublication
from voidbus.transport.message import Message, Right

# A cancel's reason is kept with the run and in its last event, which is one message with the run's
# report (characters).
REASON_LIMIT = 4000


class RunStatus(StrEnum):
    """Where a run is. The last three are terminal and never left."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RunReport(_Part):
    """What a run came to."""

    name: str
    kind: str
    success: bool
    output: str
    stages: int
    total_cost_usd: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0


class StageState(_Part):
    """One stage: a workflow's step, or the agent. `status`: running, succeeded, failed, skipped."""

    status: str
    started_at: str | None = None
    completed_at: str | None = None


class RunState(Message, tag="run.state"):
    """One run, without its events.

    `spec` is the kind, name and mode of what runs; `machine` says which backend and why;
    `run_process` is the pid of the run's process while it is alive.
    """

    id: str
    status: RunStatus
    file: str
    name: str = ""
    kind: str = ""
    mode: str = ""
    machine: str | None = None
    report: RunReport | None = None
    error: str | None = None
    attempt_id: int = 1
    started_at: str
    updated_at: str
    finished_at: str | None = None
    terminal_reason: str | None = None
    exit_code: int | None = None
    active_stage_count: int = 0
    active_microvm_count: int = 0
    policy: dict[str, Any] | None = None
    terminal_event_id: str | None = None
    stage_states: dict[str, StageState] | None = None
    artifact_publication: ArtifactPublication = ArtifactPublication()
    output_ready: bool = False
    last_seq: int = -1
    generation: int = 0
    run_process: int | None = None
    cancelling: bool = False


TERMINAL_EVENTS = ("run.finished", "run.failed", "run.cancelled")
"""The types of the events that end a run."""


class RunEvent(_Part):
    """One event of a run. `seq` starts at 0 and has no gaps in a run."""

    ts_ms: int
    level: Literal["info", "warn", "error"] = "info"
    event_type: str
    message: str
    run_id: str
    box_name: str | None = None
    skill_id: str | None = None
    skill_type: str | None = None
    environment_id: str | None = None
    mode: str | None = None
    stream: str | None = None
    seq: int
    payload: dict[str, Any] | None = None
    stage_name: str | None = None
    group_id: str | None = None
    event_id: str
    attempt_id: int = 1
    timestamp: str
    event_type_v2: str


class StartRun(Message, tag="runs.start", right=Right.OPERATE, changes=True):
    """Start a run of the specification in `file`, a path on the supervisor's host.

    Answered by RunAccepted once the run is journaled. With `strict`, a bad specification is
    refused with what is wrong in it; without, it becomes a run that fails with the same words.
    `snapshot` is accepted; the machine boots cold, and an event says so.
    """

    file: str
    input: str | None = None
    run_id: str | None = None
    policy: dict[str, Any] | None = None
    snapshot: str | None = None
    strict: bool = True


class RunAccepted(Message, tag="runs.accepted"):
    """The run is journaled and will be started. `existing`: it was there before."""

    run_id: str
    attempt_id: int
    state: RunStatus
    existing: bool = False
    warnings: tuple[str, ...] = ()


class CancelRun(Message, tag="runs.cancel", right=Right.OPERATE, changes=True):
    """Cancel a run: signal the agent, wait `grace` seconds (the run's policy where None), stop.

    Answered at once by CancelAccepted; `run.cancelled` is the event that says it is done. Of a long
    reason the first 4000 characters are kept.
    """

    run_id: str
    reason: Annotated[str, AfterValidator(lambda text: text[:REASON_LIMIT])] | None = None
    grace: float | None = Field(default=None, ge=0, le=3600)


class CancelAccepted(Message, tag="runs.cancel_accepted"):
    """The cancel is under way, or the run had ended already: then `terminal_event_id` is set."""

    run_id: str
    state: RunStatus
    terminal_event_id: str | None = None


class ListRuns(Message, tag="runs.list", right=Right.OBSERVE):
    """The runs, newest first, with the first 1000 characters of their output, those after the first
    `offset`. Ask the journal."""

    state: Literal["active", "terminal"] | None = None
    limit: int = Field(default=1000, ge=1, le=1000)
    offset: int = Field(default=0, ge=0)


class RunList(Message, tag="runs.listed"):
    """`total` counts all that match, also those past the limit."""

    runs: tuple[RunState, ...]
    total: int


class InspectRun(Message, tag="runs.inspect", right=Right.OBSERVE):
    """One run. Ask the journal; answered by RunState."""

    run_id: str


class ReadEvents(Message, tag="runs.read_events", right=Right.OBSERVE):
    """Events of a run with seq greater than `after`, in order. Ask the journal."""

    run_id: str
    after: int = -1
    limit: int = Field(default=500, ge=1, le=1000)
    stream: str | None = None


class EventPage(Message, tag="runs.events"):
    """Some events; `last_seq` is the newest the journal has, `ended` whether no more will come."""

    run_id: str
    events: tuple[RunEvent, ...]
    last_seq: int
    ended: bool


class ReadRawEvents(Message, tag="runs.read_raw_events", right=Right.OBSERVE):
    """Events of a run as they are kept: those with a seq greater than `after`, or those behind the
    event whose id is `after_id` (all, where there is none of that id). `stream` "*" are those of
    any stream: the log."""

    run_id: str
    after: int = -1
    after_id: str | None = None
    limit: int = Field(default=1000, ge=1, le=1000)
    stream: str | None = None


class RawEvents(Message, tag="runs.raw_events"):
    """The reply's attachment has the events as JSON, a line each. `last` is the seq of the last of
    the events, `last_seq` that of the newest the journal has; `ended`: no more will come."""

    run_id: str
    last: int
    last_seq: int
    ended: bool


class ReadRuns(Message, tag="runs.read", right=Right.OBSERVE):
    """Runs as they are kept, each with its first events: one question for all that is wanted at
    one moment."""

    run_ids: tuple[str, ...] = Field(min_length=1, max_length=64)


class RunRead(_Part):
    """One of the runs. `last` is the seq of the last of the events that came along, -1 where none
    did, `last_seq` that of the newest the journal has. Without `found` there is no such run."""

    run_id: str
    found: bool
    last: int = -1
    last_seq: int = -1


class RunsRead(Message, tag="runs.runs_read"):
    """As many of the runs as one message holds, from the first on; one at least. The reply has two
    attachments for each that was found: its state as JSON, and its events as JSON, a line each."""

    runs: tuple[RunRead, ...]


class CountRunStates(Message, tag="runs.count_states", right=Right.OBSERVE):
    """How many runs are there of each status, and what do they have going? Ask the journal."""


class RunStateCounts(Message, tag="runs.state_counts"):
    """Runs by status; those of none are left out. And of all runs together, the machines that are
    up and the stages that run."""

    counts: dict[str, int]
    machines: int = 0
    stages: int = 0


class EventPublished(Message, tag="runs.event"):
    """A journaled event, published on `events/<run id>`; its number there is seq + 1."""

    event: RunEvent


_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


def is_run_id(text: str) -> bool:
    """Whether it may name a run: it becomes part of addresses and paths."""
    return _RUN_ID.match(text) is not None


def events_topic(run_id: str) -> str:
    """The topic a run's events are published on, after they are journaled."""
    return f"events/{run_id}"


def run_node(run_id: str) -> str:
    """The name of a run process's node on the bus."""
    return f"run-{run_id}"


class ReadConsole(Message, tag="runs.read_console", right=Right.OBSERVE):
    """What did this run's machine write to its console? Ask `supervisor/runs`; for a run that
    goes on, it asks `run-<id>/vm`."""

    run_id: str


class ConsoleText(Message, tag="runs.console"):
    """The last 64 KiB of a machine's console, as text; "" where nothing was written."""

    text: str
