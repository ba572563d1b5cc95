"""The gateway actor: keeps the HTTP server."""

from __future__ import annotations

from collections.abc import Sequence

from voidbus.actors.runtime.actor import Actor, Place
from voidbus.gateway.server import Door, Server

_STOP_SECONDS = 5.0


class Gateway(Actor):
    """The HTTP API on these sockets, which were bound before and outlive a restart of this actor:
    clients that connect meanwhile wait."""

    mailbox_limit = 64

    def __init__(self, place: Place, doors: Sequence[Door], release: str) -> None:
        super().__init__(place)
        self._server = Server(self.system.node, doors, release)

    def on_start(self) -> None:
        self._server.start()

    def on_stop(self) -> None:
        self._server.stop(_STOP_SECONDS)
