"""What goes in and out of a sidecar: the inbox, intents, and typed rejections.

Every model is frozen and ignores keys it does not know, so a newer orchestrator or guest
can add fields without breaking an older sidecar.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

SIDECAR_VERSION = "0.2.0"
"""The version of the guest-facing HTTP interface, as `/v1/health` and `/v1/context` report it."""

DEFAULT_TTL_ITERATIONS = 2
"""How many iterations after its own an intent stays deliverable."""

IntentKind = Literal["proposal", "signal", "evaluation"]
Audience = Literal["leader", "broadcast"]
Priority = Literal["low", "normal", "high"]

# Orchestrators hold versions as unsigned 64-bit and iterations as unsigned 32-bit numbers.
U32 = Annotated[int, Field(strict=True, ge=0, lt=2**32)]
U64 = Annotated[int, Field(strict=True, ge=0, lt=2**64)]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class InboxEntry(_Wire):
    """One message for the agent, from another candidate or from the orchestrator."""

    message_id: str
    from_candidate_id: str
    kind: str
    payload: JsonValue


class InboxSnapshot(_Wire):
    """A whole inbox as the orchestrator gives it; it replaces the one before.

    `version` may be left out: the sidecar then numbers it one after the present one.
    """

    version: U64 | None = None
    execution_id: str
    candidate_id: str
    iteration: U32
    entries: tuple[InboxEntry, ...]


class InboxView(_Wire):
    """What `GET /v1/inbox` answers: the header, and the entries asked for."""

    version: int
    execution_id: str
    candidate_id: str
    iteration: U32
    entries: tuple[InboxEntry, ...]


class SidecarContext(_Wire):
    """What `GET /v1/context` answers: who the agent is and where its run stands."""

    execution_id: str
    candidate_id: str
    iteration: U32
    role: Literal["candidate"] = "candidate"
    peers: tuple[str, ...] = ()
    sidecar_version: str = SIDECAR_VERSION


class IntentSubmission(_Wire):
    """An intent as the guest sends it. All four fields are required."""

    kind: IntentKind
    audience: Audience
    payload: JsonValue
    priority: Priority


class Intent(_Wire):
    """An accepted intent, stamped by the sidecar with its id, sender and iteration."""

    intent_id: str
    from_candidate_id: str
    iteration: U32
    kind: IntentKind
    audience: Audience
    payload: JsonValue
    priority: Priority
    ttl_iterations: U32 = DEFAULT_TTL_ITERATIONS


class SidecarStatus(_Wire):
    """The `sidecar` field of an inspected run."""

    status: Literal["ok"] = "ok"
    buffer_depth: int
    inbox_version: int


class SidecarHealth(SidecarStatus):
    """What `GET /v1/health` answers."""

    sidecar_version: str = SIDECAR_VERSION
    run_id: str
    uptime_ms: int


class SidecarCounters(_Wire):
    """Totals since the state was made (a restored state counts on)."""

    accepted: int = 0
    deduplicated: int = 0
    rejected: int = 0
    acknowledged: int = 0
    """Intents handed over, by drain or by acknowledge."""
    expired: int = 0


class SidecarSnapshot(_Wire):
    """Everything a sidecar's state holds, to hand it on when a run ends or moves."""

    inbox: InboxView
    arrivals: tuple[int, ...]
    """For each inbox entry, the version at which it arrived."""
    given_version: int
    """The version of the last inbox loaded, before any pushed messages."""
    intents: tuple[Intent, ...]
    accepted_in_iteration: int
    content_hashes: dict[str, str]
    """Content hash to intent id, for duplicates to be recognised."""
    idempotency_keys: dict[str, str]
    """Digest of an idempotency key to intent id."""
    counters: SidecarCounters


RejectionCode = Literal[
    "INVALID_PARAMS", "PAYLOAD_TOO_LARGE", "TOO_MANY_REQUESTS", "NOT_FOUND", "INTERNAL_ERROR"
]


class Rejection(_Wire):
    """Why a request was refused. The three first fields are the error body every client knows."""

    code: RejectionCode
    message: str
    retryable: bool = False
    field: str | None = None
    """The field at fault, where one is: `priority`, or `[2].priority` in a batch."""
    found: str | None = None
    """What the field held, shortened."""
    allowed: tuple[str, ...] | None = None
    """What it may hold, where that is a list."""
    status: int = Field(exclude=True)
    """The HTTP status to answer with."""


class Rejected(Exception):
    """Raised where a request is refused; `rejection` says why."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection


def invalid(
    message: str,
    *,
    field: str | None = None,
    found: str | None = None,
    allowed: tuple[str, ...] | None = None,
) -> Rejection:
    """A 400: the request must be changed before it is sent again."""
    return Rejection(
        status=400,
        code="INVALID_PARAMS",
        message=message,
        field=field,
        found=found,
        allowed=allowed,
    )


def too_large(message: str) -> Rejection:
    """A 413: the request is over a size limit."""
    return Rejection(status=413, code="PAYLOAD_TOO_LARGE", message=message)


def too_many(message: str) -> Rejection:
    """A 429: the request is fine, but not now."""
    return Rejection(status=429, code="TOO_MANY_REQUESTS", message=message, retryable=True)
