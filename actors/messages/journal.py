"""What the runs actor and run processes hand the journal. Never sent by a client."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from voidbus.actors.messages.artifacts import ArtifactPublication, StoredArtifact
from voidbus.actors.messages.runs import RunEvent, RunReport, RunState, RunStatus, StageState
from voidbus.sidecar.model import Intent
from voidbus.transport.message import Message, Right


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RunProgress(_Part):
    """The parts of a run's state that its process keeps. `report` is that of a service which has
    published; other runs have theirs at the end."""

    machine: str | None = None
    active_stage_count: int = 0
    active_microvm_count: int = 0
    stage_states: dict[str, StageState] | None = None
    artifact_publication: ArtifactPublication = ArtifactPublication()
    output_ready: bool = False
    report: RunReport | None = None
    cancelling: bool = False


class RunOutcome(_Part):
    """How a run ended: its terminal state, and the intents nobody has taken yet."""

    status: RunStatus
    error: str | None = None
    terminal_reason: str | None = None
    exit_code: int | None = None
    report: RunReport | None = None
    intents: tuple[Intent, ...] = ()


class ProcessRecord(_Part):
    """A run's process, so that the next supervisor knows it again.

    The token's SHA-256 in hex, never the token. `pid` 0: it was not started yet.
    """

    generation: int
    token_digest: str
    pid: int = 0
    start_time: int = 0


class CreateRun(Message, tag="journal.create_run"):
    """Journal a run and its first events, before anything is started."""

    state: RunState
    process: ProcessRecord
    events: tuple[RunEvent, ...]


class RecordProcess(Message, tag="journal.record_process"):
    """A run's process was started."""

    run_id: str
    process: ProcessRecord


class AppendEvents(Message, tag="journal.append_events", right=Right.WORK):
    """Append events to a run, and with them its progress, files that are kept of it, or its
    outcome: all or nothing.

    Events the journal has already are skipped, so a batch may be sent again. A batch that would
    leave a gap is refused. `generation` must be the run's; a run that has ended takes no more.
    """

    run_id: str
    generation: int
    events: tuple[RunEvent, ...] = Field(max_length=1000)
    progress: RunProgress | None = None
    artifacts: tuple[StoredArtifact, ...] = ()
    outcome: RunOutcome | None = None


class Appended(Message, tag="journal.appended"):
    """The newest event the journal has of the run, and whether the run has ended."""

    run_id: str
    last_seq: int
    ended: bool


class LoadActive(Message, tag="journal.load_active"):
    """Every run that has not ended, for a new supervisor to adopt."""


class ActiveRuns(Message, tag="journal.active_runs"):
    """Runs with their processes, and the highest generation ever given."""

    runs: tuple[tuple[RunState, ProcessRecord], ...]
    last_generation: int


class ReadStages(Message, tag="journal.read_stages"):
    """The events of a run that tell of its stages, all of them: for who ends it in its place."""

    run_id: str


class StageEvents(Message, tag="journal.stage_events"):
    """Events whose type begins with `stage.`, in order."""

    run_id: str
    events: tuple[RunEvent, ...]


class TakeIntents(Message, tag="journal.take_intents"):
    """The intents left by a run that has ended, those after the first `offset`; with `drain` they
    are taken away."""

    run_id: str
    drain: bool
    offset: int = 0


class ForgetIntents(Message, tag="journal.forget_intents"):
    """Take away these of the intents left by a run that has ended."""

    run_id: str
    intent_ids: tuple[str, ...]


class RunEnded(Message, tag="journal.run_ended"):
    """Told to the runs actor when a run's outcome is journaled."""

    run_id: str
    status: RunStatus


class ProcessExited(Message, tag="runs.process_exited"):
    """Told to the runs actor by whoever saw a run process end; `returncode` as in subprocess."""

    pid: int
    start_time: int
    returncode: int | None


class NodeJoined(Message, tag="runs.node_joined"):
    """Told to the runs actor by the hub: a run process has its link."""

    node: str


class StopRuns(Message, tag="runs.stop"):
    """Told to the runs actor by the root: take no more work, and come to an end."""

    mode: str
    deadline: float


class RunsStopped(Message, tag="runs.stopped"):
    """No run is left, or those that are go on without us."""

    left: int


class CountRuns(Message, tag="runs.count"):
    """How many runs are active, and how many of them were adopted?"""


class RunCount(Message, tag="runs.counted"):
    """Runs that are active, and runs adopted since the start."""

    active: int
    adopted: int


class PruneRuns(Message, tag="journal.prune"):
    """Forget the runs that ended before `before_ms` (milliseconds since the epoch), and the oldest
    until those that have ended take up `max_bytes` at most; a few at a time. With `dry_run`
    nothing is forgotten."""

    before_ms: int | None = None
    max_bytes: int | None = None
    dry_run: bool = False


class RunsPruned(Message, tag="journal.pruned"):
    """Runs that were forgotten, and what they took up; `more`: ask again."""

    runs: tuple[str, ...]
    size_bytes: int
    more: bool


class FindUnlisted(Message, tag="journal.find_unlisted"):
    """Which of these contents does no run list?"""

    digests: tuple[str, ...] = Field(max_length=1000)


class Unlisted(Message, tag="journal.unlisted"):
    """Contents that nobody wants."""

    digests: tuple[str, ...]
