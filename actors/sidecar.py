"""The sidecar actor: one run's inbox and intents, and the server its agent talks to."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from voidbus.actors.messages.machine import SidecarEventNoted, SidecarReady
from voidbus.actors.messages.sidecar import (
    AcknowledgeIntents,
    InspectSidecar,
    IntentList,
    PushMessage,
    PutInbox,
    ReadIntents,
    SidecarState,
)
from voidbus.actors.runtime.actor import LATER, Actor, Place, Refuse, handles
from voidbus.sidecar.event import SidecarEvent
from voidbus.sidecar.model import Rejected
from voidbus.sidecar.server import SidecarServer
from voidbus.sidecar.state import SidecarState as State
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason

log = logging.getLogger("voidbus.actors")

# Events of these kinds go to the run's events; health checks and the like would only fill them, so
# they are lines of the log, for who debugs it.
_NOTED = frozenset(
    {
        "started",
        "stopping",
        "inbox_loaded",
        "message_pushed",
        "intent_accepted",
        "intent_rejected",
        "intent_deduplicated",
        "intent_expired",
        "drained",
        "acknowledged",
    }
)

# Lines of the log in all: the guest decides how often it looks after its sidecar's health.
_LOG_LINES = 1000

# An answer is one message of 4 MiB at most, and an intent's payload 4096 bytes.
_INTENTS_AT_ONCE = 512


@dataclass
class SidecarDesk:
    """What outlives a restart of the actor: no intent is lost, and the agent's URL stays good."""

    state: State
    address: tuple[str, int] = ("127.0.0.1", 0)


class SidecarActor(Actor):
    """A thin shell round the server and the state."""

    mailbox_limit = 1024

    def __init__(self, place: Place, desk: SidecarDesk, *, run_id: str, owner: str) -> None:
        super().__init__(place)
        self._run_id = run_id
        self._owner = owner
        self._desk = desk
        self._log_lines = _LOG_LINES
        self._server = SidecarServer(
            desk.state, run_id=run_id, listen=desk.address, on_event=self._noted
        )

    def on_start(self) -> None:
        address = self._server.start(5.0)
        assert isinstance(address, tuple)
        self._desk.address = address
        self.tell(f"{self.system.node.name}/{self._owner}", SidecarReady(address=address))

    def on_stop(self) -> None:
        self._server.stop(5.0)

    @handles(PutInbox)
    def on_put_inbox(self, message: PutInbox, delivery: Delivery) -> SidecarState:
        with _as_fault():
            self._server.load_inbox(message.inbox)
        return self._describe()

    @handles(PushMessage)
    def on_push(self, message: PushMessage, delivery: Delivery) -> SidecarState:
        with _as_fault():
            self._server.push_message(message.entry)
        return self._describe()

    @handles(ReadIntents)
    def on_read_intents(self, message: ReadIntents, delivery: Delivery) -> object:
        intents = self._server.peek(message.offset + _INTENTS_AT_ONCE)[message.offset :]
        delivery.reply(IntentList(run_id=self._run_id, intents=tuple(intents)))
        if message.drain and intents:
            # Taken away only once they are on their way.
            self._server.acknowledge([intent.intent_id for intent in intents])
        return LATER

    @handles(AcknowledgeIntents)
    def on_acknowledge(self, message: AcknowledgeIntents, delivery: Delivery) -> None:
        self._server.acknowledge(message.intent_ids)

    @handles(InspectSidecar)
    def on_inspect_sidecar(self, message: InspectSidecar, delivery: Delivery) -> SidecarState:
        return self._describe()

    def _describe(self) -> SidecarState:
        status = self._server.status()
        return SidecarState(
            status=status.status,
            buffer_depth=status.buffer_depth,
            inbox_version=status.inbox_version,
        )

    def _noted(self, event: SidecarEvent) -> None:
        """On the server's thread."""
        if event.kind in _NOTED:
            self.system.node.tell(
                f"{self.system.node.name}/{self._owner}",
                SidecarEventNoted(kind=event.kind, fields=_flat(event.fields)),
                sender=self.path,
            )
        elif self._log_lines and log.isEnabledFor(logging.DEBUG):
            self._log_lines -= 1
            log.debug("sidecar.%s %s", event.kind, json.dumps(event.fields))


def _flat(fields: dict[str, Any]) -> dict[str, str | int | float | bool | None]:
    """An address is a list; everything else is plain."""
    return {
        name: ":".join(str(part) for part in value) if isinstance(value, list) else value
        for name, value in fields.items()
    }


@contextmanager
def _as_fault() -> Iterator[None]:
    """What the sidecar does not take is its sender's fault, not this actor's."""
    try:
        yield
    except Rejected as error:
        raise Refuse(error.rejection.message, FaultReason.INVALID) from error
