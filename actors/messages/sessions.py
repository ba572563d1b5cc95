"""Sessions: notes that an orchestrator keeps beside its runs."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from voidbus.transport.message import Message, Right


class SessionMessage(BaseModel):
    """What somebody said, and when: milliseconds since the epoch."""

    model_config = ConfigDict(frozen=True)

    ts_ms: int
    role: str
    content: str


class AddToSession(Message, tag="sessions.add", right=Right.OPERATE, changes=True):
    """Append to a session, which is made where there is none. Ask the journal."""

    session_id: str = Field(min_length=1, max_length=200)
    message: SessionMessage


class ReadSession(Message, tag="sessions.read", right=Right.OBSERVE):
    """All of a session; the reply's attachment has the messages as JSON, a line each. Ask the
    journal."""

    session_id: str


class SessionRead(Message, tag="sessions.messages"):
    """How many there are."""

    count: int
