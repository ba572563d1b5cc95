"""A run's stages, as its events tell them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from voidbus.actors.messages.runs import RunEvent, StageState

_ENDED = {
    "stage.completed": "succeeded",
    "stage.failed": "failed",
    "stage.skipped": "skipped",
}


class StageTable:
    """Stage states for RunState; a stage that was only queued is absent."""

    def __init__(self, known: Mapping[str, StageState] | None = None) -> None:
        self._states: dict[str, StageState] = dict(known or {})
        self._queued: dict[str, None] = {}  # in their order
        self._groups: dict[str, str | None] = {}
        self._started_ms: dict[str, int] = {}
        self._attempts: dict[str, int] = {}

    @property
    def active(self) -> int:
        return sum(state.status == "running" for state in self._states.values())

    @property
    def running(self) -> list[str]:
        return [stage for stage, state in self._states.items() if state.status == "running"]

    @property
    def queued(self) -> list[str]:
        """Stages that were queued and have not been started or skipped, in the order of that."""
        return list(self._queued)

    @property
    def states(self) -> dict[str, StageState] | None:
        return dict(self._states) or None

    def observe(self, event: RunEvent) -> bool:
        """Take an event in. True where a stage changed."""
        stage = event.stage_name
        if stage is None or not event.event_type.startswith("stage."):
            return False
        self._groups[stage] = event.group_id
        if event.event_type == "stage.queued":
            self._queued[stage] = None
        else:
            self._queued.pop(stage, None)
        if event.event_type == "stage.started":
            self._states[stage] = StageState(status="running", started_at=event.timestamp)
            self._started_ms[stage] = event.ts_ms
            attempt = (event.payload or {}).get("stage_attempt")
            self._attempts[stage] = attempt if isinstance(attempt, int) else 1
        elif event.event_type in _ENDED:
            known = self._states.get(stage)
            self._states[stage] = StageState(
                status=_ENDED[event.event_type],
                started_at=known.started_at if known else None,
                completed_at=event.timestamp,
            )
        return True

    def cancel(
        self, emit: Callable[..., None], stage: str, state: str, *, error: str = "run cancelled"
    ) -> None:
        """Emit the event that ends `stage`, which was `started` or only `queued`."""
        group = self._groups.get(stage)
        now_ms = time.time_ns() // 1_000_000
        if state == "queued":
            emit(
                "stage.skipped",
                f"stage {stage} skipped",
                level="warn",
                payload={"reason": error, "stage_attempt": self._attempts.get(stage, 1)},
                stage=stage,
                group=group,
            )
            return
        emit(
            "stage.failed",
            f"stage {stage} ended: {error}",
            level="error",
            payload={
                "duration_ms": max(0, now_ms - self._started_ms.get(stage, now_ms)),
                "exit_code": -1,
                "error": error,
                "stage_attempt": self._attempts.get(stage, 1),
            },
            stage=stage,
            group=group,
        )
