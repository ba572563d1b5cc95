"""One stage's events: queued, started, ended, and started again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from voidbus.actors.workloads.conductor import ERROR_LIMIT, Conductor, Exit, Level

# Before an attempt that follows a failure, in seconds; twice as long each time.
RETRY_FIRST_SECONDS = 0.1
RETRY_LONGEST_SECONDS = 10.0


class Stage:
    """A step, a box or the agent. `noun` is what its messages call it."""

    def __init__(
        self,
        conductor: Conductor,
        name: str,
        *,
        noun: str,
        group: str,
        box: str | None = None,
        retries: int = 0,
    ) -> None:
        self._conductor = conductor
        self.name = name
        self.attempt = 1
        self._noun = noun
        self._group = group
        self._box = box
        self._retries = retries

    def queued(self, depends_on: Sequence[str] = ()) -> None:
        self._emit("stage.queued", payload={"depends_on": list(depends_on)})

    def started(self) -> None:
        self._emit("stage.started", payload={"stage_attempt": self.attempt})

    def completed(self, end: Exit) -> None:
        self._emit(
            "stage.completed",
            payload={
                "duration_ms": end.duration_ms,
                "exit_code": end.exit_code,
                "stage_attempt": self.attempt,
            },
        )

    def failed(self, end: Exit, error: str) -> None:
        self._emit(
            "stage.failed",
            level="error",
            payload={
                "duration_ms": end.duration_ms,
                "exit_code": end.exit_code or 1,
                "error": error[:ERROR_LIMIT],
                "stage_attempt": self.attempt,
            },
        )

    def skipped(self, reason: str) -> None:
        payload = {"reason": reason[:ERROR_LIMIT], "stage_attempt": self.attempt}
        self._emit("stage.skipped", level="warn", payload=payload)

    def retry(self, again: Callable[[], None]) -> bool:
        """After a failure: call `again` in a while, where the run's policy allows one more try."""
        if self.attempt > self._retries:
            return False
        delay = min(RETRY_LONGEST_SECONDS, RETRY_FIRST_SECONDS * 2 ** min(self.attempt - 1, 20))
        self.attempt += 1
        self._conductor.after_working(delay, again)
        return True

    def emit(
        self,
        event_type: str,
        message: str,
        *,
        level: Level = "info",
        payload: Mapping[str, Any] | None = None,
    ) -> None:
        """Record an event about this stage."""
        self._conductor.emit(
            event_type,
            message,
            level=level,
            payload=payload,
            stage=self.name,
            group=self._group,
            box=self._box,
        )

    def _emit(self, event_type: str, *, level: Level = "info", payload: Mapping[str, Any]) -> None:
        what = event_type.removeprefix("stage.")
        self.emit(event_type, f"{self._noun} {what}", level=level, payload=payload)
