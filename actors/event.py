"""Making run events: names in both spellings, ids, timestamps."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

from voidbus.actors.messages.runs import RunEvent

_SECOND_NAMES = {
    "run.finished": "RunCompleted",
    "run.spec.loaded": "SpecLoaded",
    "env.provisioned": "EnvironmentProvisioned",
    "stage.completed": "StageSucceeded",
}


def second_name(event_type: str) -> str:
    """The event's name in version 2 of the API: `stage.completed` is `StageSucceeded`."""
    known = _SECOND_NAMES.get(event_type)
    if known is not None:
        return known
    return "".join(part.capitalize() for part in event_type.replace("_", ".").split("."))


def uuid7(now_ms: int) -> str:
    """A UUID of version 7 (RFC 9562, section 5.7): sorts by time."""
    random = int.from_bytes(os.urandom(10), "big")
    value = (now_ms & (2**48 - 1)) << 80 | random
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(UUID(int=value))


def timestamp(now_ns: int) -> str:
    """RFC 3339 in UTC, nine digits of fraction where there is one."""
    seconds, fraction = divmod(now_ns, 1_000_000_000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction:09d}Z" if fraction else f"{text}Z"


class EventMaker:
    """Numbers and stamps the events of one run, one writer at a time.

    `next_seq` continues after what was journaled before.
    """

    def __init__(self, run_id: str, mode: str, next_seq: int = 0) -> None:
        self.run_id = run_id
        self.mode = mode
        self.next_seq = next_seq

    def make(
        self,
        event_type: str,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        payload: Mapping[str, Any] | None = None,
        stage: str | None = None,
        group: str | None = None,
        box: str | None = None,
        stream: str | None = None,
        skill: tuple[str, str] | None = None,
    ) -> RunEvent:
        """The next event. `skill` is (type, id)."""
        now_ns = time.time_ns()
        now_ms = now_ns // 1_000_000
        event = RunEvent(
            ts_ms=now_ms,
            level=level,
            event_type=event_type,
            message=message,
            run_id=self.run_id,
            box_name=box,
            skill_id=skill[1] if skill else None,
            skill_type=skill[0] if skill else None,
            environment_id=f"env-{self.run_id}",
            mode=self.mode,
            stream=stream,
            seq=self.next_seq,
            payload=dict(payload) if payload is not None else None,
            stage_name=stage,
            group_id=group,
            event_id=uuid7(now_ms),
            timestamp=timestamp(now_ns),
            event_type_v2=second_name(event_type),
        )
        self.next_seq += 1
        return event
