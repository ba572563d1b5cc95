"""A run's event as a line for people."""

from __future__ import annotations

from voidbus.actors.messages.runs import RunEvent
from voidbus.cli.output import paint, plain

_LEVELS = {"warn": "yellow", "error": "red"}


def clock(event: RunEvent) -> str:
    """The time of day in UTC, to the millisecond: `12:03:04.567`."""
    time_of_day = event.timestamp.partition("T")[2].rstrip("Z")
    whole, _, fraction = time_of_day.partition(".")
    return f"{whole}.{fraction[:3]:0<3}"


def event_line(event: RunEvent) -> str:
    """`SEQ TIME LEVEL TYPE [STAGE] MESSAGE`, coloured where standard output is a terminal."""
    stage = f"[{plain(event.stage_name)}] " if event.stage_name else ""
    level = event.level.ljust(5)
    return (
        f"{event.seq:>5} {paint(clock(event), 'dim')} "
        f"{paint(level, _LEVELS.get(event.level, ''))} {plain(event.event_type):<18} "
        f"{stage}{plain(event.message)}"
    )


def log_text(event: RunEvent) -> str | None:
    """The line a program printed; None where the event is no line of a log."""
    if event.event_type != "log.chunk":
        return None
    data = (event.payload or {}).get("data")
    return data if isinstance(data, str) else event.message
