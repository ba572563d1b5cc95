"""What a sidecar reports while it serves."""

from dataclasses import dataclass
from typing import Any, Literal

EventKind = Literal[
    "started",
    "stopping",
    "inbox_loaded",
    "message_pushed",
    "intent_accepted",
    "intent_rejected",
    "intent_deduplicated",
    "intent_expired",
    "drained",
    "acknowledged",
    "health_served",
]


@dataclass(frozen=True, slots=True)
class SidecarEvent:
    """One thing that happened, with its details.

    `fields` holds plain JSON values: ids, kinds, counts and versions, never a payload.
    """

    kind: EventKind
    run_id: str
    fields: dict[str, Any]
