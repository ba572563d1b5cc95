"""One stream between a socket of the host and a port of the guest, and its credit."""

from __future__ import annotations

import socket
from collections.abc import Callable

from voidbus.vm.devices.event_loop import READ, WRITE
from voidbus.vm.devices.vsock_packets import WRAP

WINDOW = 256 * 1024
"""Bytes of one stream the guest may send ahead of the host's reader."""
SMALL_WINDOW = 32 * 1024
"""The same once the streams there are have used up what all may hold together."""


class Owed:
    """Packets a connection has still to send: bits, in the order in which they go. Plain integers,
    as they are looked at for every packet."""

    REQUEST = 1
    RESPONSE = 2
    CREDIT_UPDATE = 4
    CREDIT_REQUEST = 8
    SHUTDOWN = 16


class Connection:
    """A connection and its two half-streams. It owns ``sock``, which is non-blocking.

    ``backlog`` is what the guest has sent and the host's reader has not taken: never more than
    ``window``, as the guest is told that, and one that sends more is reset.
    """

    __slots__ = (
        "accepted",
        "asked",
        "backlog",
        "burst",
        "closed",
        "deadline",
        "end",
        "events",
        "forwarded",
        "guest_deaf",
        "guest_done",
        "host_deaf",
        "host_done",
        "hung",
        "local_port",
        "on_accepted",
        "owed",
        "peer_alloc",
        "peer_forwarded",
        "peer_port",
        "received",
        "repeated",
        "sent",
        "sock",
        "stalled",
        "told",
        "waiting",
        "window",
    )

    def __init__(self, sock: socket.socket, local_port: int, peer_port: int, window: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.local_port = local_port
        self.peer_port = peer_port
        self.window = window
        self.accepted = False
        self.repeated = False
        """The guest was sent more than one request for it."""
        self.closed = False
        self.on_accepted: Callable[[int], bool] | None = None
        self.deadline: float | None = None
        """When the state it is in must be over (monotonic seconds), if it must."""
        # From the guest to the host.
        self.received = 0
        self.forwarded = 0
        self.told = 0
        """What of ``forwarded`` the guest knows."""
        self.backlog = bytearray()
        self.guest_done = False
        self.host_deaf = False
        # From the host to the guest.
        self.sent = 0
        self.peer_alloc = 0
        self.peer_forwarded = 0
        self.burst = 1
        """How many of the guest's buffers the next read is given."""
        self.host_done = False
        self.guest_deaf = False
        self.end = (False, False)
        """``host_done`` and ``host_deaf`` as the guest was told."""
        # Where it stands with the loop, the guest's credit and its buffers.
        self.events = -1
        """What is waited for; -1 if it is not watched."""
        self.hung = False
        """The other end of the socket was seen to be gone."""
        self.stalled = False
        """The guest gives no credit."""
        self.asked = False
        """The guest was asked for credit in this stall."""
        self.waiting = False
        """The guest has no buffer; it is in the queue for the next."""
        self.owed = 0
        """Bits of Owed."""

    @property
    def credit(self) -> int:
        """Bytes the guest takes at the moment (virtio 1.2, 5.10.6.3)."""
        return max(0, self.peer_alloc - ((self.sent - self.peer_forwarded) & WRAP))

    @property
    def may_read(self) -> bool:
        """Whether the host's data may be read: the guest hears, has credit and buffers."""
        return not (
            self.host_done
            or self.guest_deaf
            or self.stalled
            or self.waiting
            or not self.accepted
            or self.owed & Owed.RESPONSE
        )

    @property
    def wanted(self) -> int:
        """The events of the socket to wait for; -1 for none at all, not even its end."""
        events = READ if self.may_read else 0
        if self.backlog:
            events |= WRITE
        # The end of a socket is told again and again, so once it is known it is not asked for.
        return -1 if not events and self.hung else events

    def forward(self, pieces: list[memoryview], length: int) -> None:
        """Hand bytes of the guest to the host's reader, and keep what it does not take. The
        caller has checked that they fit."""
        self.received += length
        if self.backlog:
            for piece in pieces:
                self.backlog += piece
            return
        try:
            if len(pieces) == 1:
                count = self.sock.send(pieces[0], socket.MSG_NOSIGNAL)
            else:
                count = self.sock.sendmsg(pieces, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            count = 0
        except OSError:
            self._deafen()
            return
        self.forwarded += count
        if count == length:
            return
        for piece in pieces:
            if count >= len(piece):
                count -= len(piece)
            else:
                self.backlog += piece[count:]
                count = 0

    def flush(self) -> None:
        """Try to hand on the backlog."""
        try:
            count = self.sock.send(self.backlog, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self._deafen()
            return
        self.forwarded += count
        del self.backlog[:count]

    def _deafen(self) -> None:
        """Nobody at the host reads any more. What it has sent is still delivered."""
        self.host_deaf = True
        self.forwarded = self.received
        self.backlog.clear()
