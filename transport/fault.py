"""Why a message was not handled: the typed answer that takes the place of a silent timeout."""

from __future__ import annotations

from enum import StrEnum

from voidbus.transport.message import Message


class FaultReason(StrEnum):
    """Why a message came back. docs/messages.md says what a sender may do about each."""

    NO_SUCH_NODE = "no_such_node"
    NO_SUCH_ACTOR = "no_such_actor"
    MAILBOX_FULL = "mailbox_full"
    MAILBOX_CLOSED = "mailbox_closed"
    EXPIRED = "expired"
    REFUSED = "refused"
    UNHANDLED = "unhandled"
    FAILED = "failed"
    INVALID = "invalid"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    LINK_LOST = "link_lost"
    STALE = "stale"
    CLOSED = "closed"


class Fault(Message, tag="bus.fault"):
    """A message that was not handled: the reason, a sentence, and who it was for."""

    reason: FaultReason
    detail: str
    address: str


class BusError(Exception):
    """Raised where a caller waits for a reply and a fault came instead."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"{fault.address}: {fault.detail} ({fault.reason})")
        self.fault = fault

    @property
    def reason(self) -> FaultReason:
        return self.fault.reason
