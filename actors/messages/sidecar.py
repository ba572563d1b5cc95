"""Inboxes and intents: what orchestrators and operators exchange with an agent's sidecar."""

from __future__ import annotations

from pydantic import Field

from voidbus.sidecar.model import InboxEntry, InboxSnapshot, Intent
from voidbus.transport.message import Message, Right

__all__ = [
    "AcknowledgeIntents",
    "InboxEntry",
    "InboxSnapshot",
    "InspectSidecar",
    "Intent",
    "IntentList",
    "PushMessage",
    "PutInbox",
    "ReadIntents",
    "SidecarState",
]


class PutInbox(Message, tag="sidecar.put_inbox", right=Right.OPERATE, changes=True):
    """Replace a run's inbox. Answered by SidecarState."""

    run_id: str
    inbox: InboxSnapshot


class PushMessage(Message, tag="sidecar.push_message", right=Right.OPERATE, changes=True):
    """Add one entry to a run's inbox, made where there is none. Answered by SidecarState."""

    run_id: str
    entry: InboxEntry


class ReadIntents(Message, tag="sidecar.read_intents", right=Right.OPERATE, changes=True):
    """The intents a run's agent sent, those after the first `offset`. With `drain` they are taken
    away; works after its end too."""

    run_id: str
    drain: bool = False
    offset: int = Field(default=0, ge=0)


class AcknowledgeIntents(
    Message, tag="sidecar.acknowledge_intents", right=Right.OPERATE, changes=True
):
    """These intents have arrived where they are wanted: take them away. Answered by Done; works
    after the run's end too."""

    run_id: str
    intent_ids: tuple[str, ...] = Field(max_length=5000)


class IntentList(Message, tag="sidecar.intents"):
    """Intents, oldest first."""

    run_id: str
    intents: tuple[Intent, ...]


class InspectSidecar(Message, tag="sidecar.inspect", right=Right.OBSERVE):
    """How is the sidecar of this run? Ask `run-<id>/sidecar`."""


class SidecarState(Message, tag="sidecar.state"):
    """A sidecar's depth and version."""

    status: str
    buffer_depth: int
    inbox_version: int
