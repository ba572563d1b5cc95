"""What the API's bodies are made of: names, spellings and nulls are those its clients know.

An absent field is an explicit null, but for the few marked "left out where there is none".
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from voidbus.actors.messages.artifacts import ArtifactPublication, ManifestEntry
from voidbus.actors.messages.runs import RunEvent, RunReport, RunState, RunStatus
from voidbus.actors.messages.sidecar import SidecarState
from voidbus.actors.messages.telemetry import GuestSample, HostSample, Sample, TelemetryPage

U32 = 2**32 - 1
U64 = 2**64 - 1


class Wire(BaseModel):
    """Base of the API's models. Fields a client adds are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Sparse(Wire):
    """A model whose absent optional fields are left out."""

    @model_serializer(mode="wrap")
    def _without_nulls(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value is not None}


# -- requests ----------------------------------------------------------------------------------


class StartRequest(Wire):
    """`POST /v1/runs`: `file` is a path on the supervisor's host. `snapshot` is accepted, and the
    machine boots cold."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    file: str
    input: str | None = None
    run_id: str | None = None
    policy: dict[str, Any] | None = None
    snapshot: str | None = None


class CancelRequest(Wire):
    """`POST /v1/runs/{run_id}/cancel`. `grace_secs` stands over the run's policy."""

    reason: str | None = None
    grace_secs: float | None = Field(default=None, ge=0, le=3600)


class SessionRequest(Wire):
    """`POST /v1/sessions/{session_id}/messages`."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    role: str
    content: str


# -- answers -----------------------------------------------------------------------------------


class Health(Wire):
    """Whether the API answers, and where it keeps runs."""

    status: Literal["ok"] = "ok"
    persistence: Literal["disk"] = "disk"


class Started(Wire):
    """A run that was started, or was there before under the same id."""

    run_id: str
    attempt_id: int
    state: RunStatus


class Cancelled(Wire):
    """How a run stands after a cancel. `terminal_event_id` is null while it has not ended."""

    run_id: str
    state: RunStatus
    terminal_event_id: str | None


class Ok(Wire):
    """It was done."""

    ok: Literal[True] = True


class StageTimes(Sparse):
    """One stage in a run's `stage_states`; times are left out where there are none."""

    status: str
    started_at: str | None = None
    completed_at: str | None = None


class Entry(Sparse):
    """A line of a manifest; size and digest are left out where the bytes were not kept."""

    name: str
    stage: str
    media_type: str
    size_bytes: int | None = None
    digest: str | None = None
    retrieval_path: str

    @classmethod
    def of(cls, entry: ManifestEntry) -> Entry:
        digest = None if entry.digest is None else f"sha256:{entry.digest}"
        return cls(**{**entry.model_dump(), "digest": digest})


class Publication(Sparse):
    """What a run has published; `published_at` is left out before that."""

    status: Literal["not_started", "publishing", "published", "failed"]
    published_at: str | None = None
    manifest: tuple[Entry, ...]

    @classmethod
    def of(cls, publication: ArtifactPublication) -> Publication:
        return cls(
            status=publication.status,
            published_at=publication.published_at,
            manifest=tuple(Entry.of(entry) for entry in publication.manifest),
        )


class SidecarView(Wire):
    """A run's sidecar, while there is one."""

    status: str
    buffer_depth: int
    inbox_version: int

    @classmethod
    def of(cls, state: SidecarState) -> SidecarView:
        return cls(
            status=state.status,
            buffer_depth=state.buffer_depth,
            inbox_version=state.inbox_version,
        )


class RunHead(Wire):
    """A run without its events. `name`, `kind`, `machine` and `cancelling` are of this
    implementation."""

    id: str
    status: RunStatus
    file: str
    report: RunReport | None
    error: str | None
    attempt_id: int
    started_at: str
    updated_at: str
    terminal_reason: str | None
    exit_code: int | None
    active_stage_count: int
    active_microvm_count: int
    policy: dict[str, Any] | None
    terminal_event_id: str | None
    finished_at: str | None
    stage_states: dict[str, StageTimes] | None
    artifact_publication: Publication
    output_ready: bool
    name: str
    kind: str
    machine: str | None
    cancelling: bool

    @classmethod
    def of(cls, state: RunState) -> RunHead:
        stages = state.stage_states
        return cls(
            id=state.id,
            status=state.status,
            file=state.file,
            report=state.report,
            error=state.error,
            attempt_id=state.attempt_id,
            started_at=state.started_at,
            updated_at=state.updated_at,
            terminal_reason=state.terminal_reason,
            exit_code=state.exit_code,
            active_stage_count=state.active_stage_count,
            active_microvm_count=state.active_microvm_count,
            policy=state.policy,
            terminal_event_id=state.terminal_event_id,
            finished_at=state.finished_at,
            stage_states=None
            if stages is None
            else {name: StageTimes(**stage.model_dump()) for name, stage in stages.items()},
            artifact_publication=Publication.of(state.artifact_publication),
            output_ready=state.output_ready,
            name=state.name,
            kind=state.kind,
            machine=state.machine,
            cancelling=state.cancelling,
        )


class RunView(RunHead):
    """A run with its events. `sidecar` is there while the run has one."""

    events: tuple[RunEvent, ...]
    sidecar: SidecarView | None = None


class RunsView(Wire):
    """Runs, newest first."""

    runs: tuple[RunView, ...]


class StageView(Wire):
    """A stage as its events tell it. `stage_attempt` is the newest."""

    stage_name: str
    box_name: str | None
    group_id: str | None
    depends_on: tuple[str, ...]
    status: Literal["queued", "running", "succeeded", "failed", "skipped"]
    stage_attempt: int
    started_at: str | None
    completed_at: str | None
    duration_ms: int | None
    exit_code: int | None


class StagesView(Wire):
    """The stages of a run, in the order they were queued."""

    run_id: str
    attempt_id: int
    updated_at: str
    stages: tuple[StageView, ...]


def _rfc3339(ms: int) -> str:
    """Milliseconds since the epoch as clients read times: UTC, nine digits of a fraction."""
    moment = datetime.fromtimestamp(ms // 1000, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}000000Z"


class SampleView(Wire):
    """One sample, of the guest or of the run's process; the other is left out, and so is the
    `timestamp` of a guest's."""

    seq: int
    timestamp_ms: int
    timestamp: str | None = None
    stage_name: str | None
    guest: GuestSample | None = None
    host: HostSample | None = None

    @model_serializer(mode="wrap")
    def _without_the_other(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {
            name: value
            for name, value in fields.items()
            if value is not None or name == "stage_name"
        }

    @classmethod
    def of(cls, sample: Sample) -> SampleView:
        return cls(
            seq=sample.seq,
            timestamp_ms=sample.timestamp_ms,
            timestamp=None if sample.host is None else _rfc3339(sample.timestamp_ms),
            stage_name=sample.stage_name,
            guest=sample.guest,
            host=sample.host,
        )


class TelemetryView(Wire):
    """Samples of a run. Pass `next_seq` back as `from_seq`."""

    run_id: str
    attempt_id: int
    next_seq: int
    samples: tuple[SampleView, ...]

    @classmethod
    def of(cls, page: TelemetryPage) -> TelemetryView:
        return cls(
            run_id=page.run_id,
            attempt_id=1,
            next_seq=page.next_seq,
            samples=tuple(SampleView.of(sample) for sample in page.samples),
        )
