"""The stages of a run, as its events tell them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from voidbus.actors.messages.runs import RunEvent
from voidbus.gateway.wire import StageView

_STATUS = {
    "stage.queued": "queued",
    "stage.started": "running",
    "stage.completed": "succeeded",
    "stage.failed": "failed",
    "stage.skipped": "skipped",
}
_ENDED = frozenset({"succeeded", "failed", "skipped"})


def stages_of(events: Iterable[RunEvent]) -> tuple[StageView, ...]:
    """In the order of the first `stage.queued`; a stage that never was queued is not shown."""
    stages: dict[str, dict[str, Any]] = {}
    for event in events:
        status = _STATUS.get(event.event_type)
        if event.stage_name is None or status is None:
            continue
        if status == "queued" and event.stage_name not in stages:
            stages[event.stage_name] = _queued(event)
        elif event.stage_name in stages and status != "queued":
            stages[event.stage_name].update(_changed(status, event))
    return tuple(StageView(**stage) for stage in stages.values())


def _queued(event: RunEvent) -> dict[str, Any]:
    depends_on = (event.payload or {}).get("depends_on")
    return {
        "stage_name": event.stage_name,
        "box_name": event.box_name,
        "group_id": event.group_id,
        "depends_on": tuple(depends_on) if isinstance(depends_on, list) else (),
        "status": "queued",
        "stage_attempt": 1,
        "started_at": None,
        "completed_at": None,
        "duration_ms": None,
        "exit_code": None,
    }


def _changed(status: str, event: RunEvent) -> dict[str, Any]:
    payload = event.payload or {}
    change: dict[str, Any] = {"status": status, "stage_attempt": payload.get("stage_attempt", 1)}
    if status == "running":
        # Tried again: what the attempt before came to no longer holds.
        change |= {
            "started_at": event.timestamp,
            "completed_at": None,
            "duration_ms": None,
            "exit_code": None,
        }
    if status in _ENDED:
        change["completed_at"] = event.timestamp
        change["duration_ms"] = payload.get("duration_ms")
        change["exit_code"] = payload.get("exit_code")
    return change
