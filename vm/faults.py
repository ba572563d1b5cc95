"""How a call to a guest fails."""

from __future__ import annotations

import enum


class FaultReason(enum.StrEnum):
    """Why there is no answer."""

    CLOSED = "closed"
    """The channel was closed on this side."""
    LOST = "lost"
    """The connection ended or broke."""
    PROTOCOL = "protocol"
    """The guest sent bytes that are not the protocol."""
    DEADLINE = "deadline"
    """No answer in time."""
    OVERLOADED = "overloaded"
    """Too much is waiting to be sent."""
    REFUSED = "refused"
    """The guest answered that it can't or won't."""
    UNSUPPORTED = "unsupported"
    """This guest does not know how."""


class ChannelFault(Exception):
    """A call to the guest ended without a result."""

    def __init__(self, reason: FaultReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
