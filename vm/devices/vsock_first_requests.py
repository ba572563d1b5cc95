"""Requests of the host that a driver may lose while it comes up.

Linux fills its receive queue, and so takes what waits there, a moment before it can answer: a
reply made in between is dropped (6.1, net/vmw_vsock/virtio_transport.c: `virtio_vsock_probe` sets
`the_virtio_vsock` last; mended in October 2023 by 53b08c498515, "vsock/virtio: initialize
the_virtio_vsock before using VQs", and in stable releases since).
So what was asked before the guest has ever said anything is asked again until it is answered. To
Linux that has taken it the repeat means nothing; another guest may answer twice.
"""

from __future__ import annotations

from collections.abc import Callable

from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.vsock_connection import Connection, Owed

AGAIN_SECONDS = 0.5
"""Between two requests for one connection. CONNECT_SECONDS ends them."""


class FirstRequests:
    """The connections that were asked for before the guest had said anything. On the loop's
    thread."""

    def __init__(self, ask: Callable[[list[Connection]], None]) -> None:
        """``ask`` is told for which connections to send a request once more."""
        self._ask = ask
        self._up = False
        self._heard = False
        self._unsure: list[Connection] = []
        self._due = False

    def attach(self, loop: EventLoop) -> None:
        self._loop = loop

    def asked(self, connection: Connection) -> None:
        """A connection of the host's was made."""
        if not self._heard:
            self._unsure.append(connection)
            self._later()

    def driver_is_up(self) -> None:
        """The guest takes packets from now on, those that wait first."""
        self._up = True
        self._later()

    def heard(self) -> None:
        """The guest has said something: what it is asked from now on it can answer."""
        self._heard = True

    def reset(self) -> None:
        """The driver is gone."""
        self._up = self._heard = False
        self._unsure.clear()

    def _later(self) -> None:
        if self._up and self._unsure and not self._due:
            self._due = True
            self._loop.later(AGAIN_SECONDS, self._again)

    def _again(self) -> None:
        self._due = False
        self._unsure = [each for each in self._unsure if not (each.closed or each.accepted)]
        # One that is still owed has not been sent yet.
        self._ask([each for each in self._unsure if not each.owed & Owed.REQUEST])
        self._later()
