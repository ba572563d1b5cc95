"""How long clients may take."""

from __future__ import annotations

from dataclasses import dataclass

BODY_SECONDS = 30.0
"""For a request's whole body."""

IDLE_SECONDS = 75.0
"""How long a connection may be without a request under way: before the first, and between two.
The time nginx gives its clients (`keepalive_timeout`)."""

STALLED_SECONDS = 60.0
"""How long a client may read nothing of an answer that waits for it."""


@dataclass(frozen=True)
class Patience:
    """What one server gives its clients, in seconds."""

    body: float = BODY_SECONDS
    idle: float = IDLE_SECONDS
    stalled: float = STALLED_SECONDS


USUAL = Patience()
"""What clients get where nothing else is said."""
