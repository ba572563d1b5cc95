"""Showing a run while it goes on: live on a terminal, as lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from voidbus.actors.messages.runs import RunEvent
from voidbus.cli.event_line import clock, log_text
from voidbus.cli.output import STATUS_COLOURS, colourful, duration, note, plain

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# What the live display shows of a log, and how often it is drawn anew (seconds).
_LOG_LINES = 8
_REFRESH = 0.1

_STAGE_EVENTS = {
    "stage.queued": "queued",
    "stage.started": "running",
    "stage.completed": "succeeded",
    "stage.failed": "failed",
    "stage.skipped": "skipped",
}
_MARKS = {"succeeded": "✓", "failed": "✗", "skipped": "-", "queued": "·"}


class Progress(Protocol):
    """What `voidbus run` tells of a run's events. Use it with `with`."""

    # How long to wait for the next event before `tick` (seconds).
    interval: float

    def __enter__(self) -> Progress: ...

    def __exit__(self, *exception: object) -> None: ...

    def show(self, event: RunEvent) -> None:
        """An event has come."""

    def tell(self, text: str) -> None:
        """Something else to say."""

    def tick(self) -> None:
        """Time has passed."""


def progress_for(run_id: str, *, quiet: bool) -> Progress:
    """How to show this run: not at all, live on standard error, or as lines on it."""
    if quiet:
        return Silent()
    if colourful(sys.stderr):
        return Live(run_id)
    return Lines()


class Silent:
    """Shows nothing but what is told."""

    interval = 1.0

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def show(self, event: RunEvent) -> None:
        return None

    def tell(self, text: str) -> None:
        note(f"voidbus: {text}")

    def tick(self) -> None:
        return None


class Lines(Silent):
    """A line for each event, on standard error."""

    def show(self, event: RunEvent) -> None:
        stage = f"[{plain(event.stage_name)}] " if event.stage_name else ""
        text = log_text(event)
        if text is not None:
            note(f"{clock(event)} {stage}| {plain(text)}")
        else:
            note(f"{clock(event)} {stage}{plain(event.event_type)}: {plain(event.message)}")


class _Stage:
    def __init__(self) -> None:
        self.status = "queued"
        self.started = 0.0
        self.took: float | None = None

    def observe(self, status: str, event: RunEvent) -> None:
        self.status = status
        if status == "running":
            self.started = time.monotonic()
        elif status != "queued":
            known = (event.payload or {}).get("duration_ms")
            self.took = known / 1000 if isinstance(known, int | float) else None

    @property
    def elapsed(self) -> float | None:
        return time.monotonic() - self.started if self.status == "running" else self.took


class Live:
    """Stages, time and the last lines of the log, drawn anew in place on standard error."""

    interval = _REFRESH

    def __init__(self, run_id: str) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive
        from rich.spinner import Spinner
        from rich.text import Text

        self._text = Text
        self._run_id = run_id
        self._doing = "starting"
        self._began = time.monotonic()
        self._drawn = 0.0
        self._stages: dict[str, _Stage] = {}
        self._log: deque[tuple[str, str]] = deque(maxlen=_LOG_LINES)
        self._spinner = Spinner("dots", style="cyan")
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        # Drawn by `tick`, without a thread of its own.
        self._live = RichLive(
            self._picture(),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        # What stays of it is how the stages ended.
        self._live.update(self._stage_table(), refresh=True)
        self._live.stop()

    def show(self, event: RunEvent) -> None:
        status = _STAGE_EVENTS.get(event.event_type)
        text = log_text(event)
        if status is not None and event.stage_name is not None:
            self._stages.setdefault(event.stage_name, _Stage()).observe(status, event)
        elif text is not None:
            self._log.append((event.stage_name or "", text))
        elif not event.event_type.startswith("log."):
            self._doing = event.message
        if event.level != "info" and text is None:
            self._console.print(self._text(plain(event.message), "yellow"))
        self.tick()

    def tell(self, text: str) -> None:
        self._console.print(self._text(f"voidbus: {plain(text)}", ""))

    def tick(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= _REFRESH:
            self._drawn = now
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        head = Table.grid(padding=(0, 1))
        head.add_column(no_wrap=True)
        # A long message is what gives way on a narrow terminal.
        head.add_column(no_wrap=True, min_width=len(self._run_id))
        head.add_column(no_wrap=True, min_width=6, style="dim")
        head.add_column(no_wrap=True, overflow="ellipsis")
        elapsed = duration(time.monotonic() - self._began)
        head.add_row(
            self._spinner,
            self._text(plain(self._run_id), "bold"),
            self._text(elapsed),
            plain(self._doing),
        )
        lines = [
            self._text(f"  {plain(stage)}| {plain(text)}", "dim", no_wrap=True, overflow="ellipsis")
            for stage, text in self._log
        ]
        return Group(head, self._stage_table(), *lines)

    def _stage_table(self) -> Table:
        from rich.table import Table

        stages = Table.grid(padding=(0, 1))
        for name, stage in self._stages.items():
            mark = _MARKS.get(stage.status, "▸")
            colour = STATUS_COLOURS.get(stage.status, "dim")
            stages.add_row(
                self._text(f"  {mark}", colour),
                self._text(plain(name)),
                self._text(stage.status, colour),
                self._text(duration(stage.elapsed), "dim"),
            )
        return stages
