"""What a host can say about a kind of machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Support:
    """Whether machines of the kind ``machine`` work here; how well, or why not (``detail``); and
    the command that mends or betters it, if there is one."""

    machine: str
    works: bool
    detail: str
    remedy: str | None = None
