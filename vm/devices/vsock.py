"""The virtio socket device (virtio 1.2, section 5.10): streams between guest and host."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Callable
from typing import ClassVar

from voidbus.vm.devices.device import QUEUE_SIZE, RING_FEATURES, VirtioDevice
from voidbus.vm.devices.event_loop import HANGUP, WRITE, EventLoop
from voidbus.vm.devices.virtqueue import Chain, Virtqueue
from voidbus.vm.devices.vsock_connection import SMALL_WINDOW, WINDOW, Connection, Owed
from voidbus.vm.devices.vsock_first_requests import FirstRequests
from voidbus.vm.devices.vsock_packets import (
    F_STREAM,
    HEADER,
    HOST_CID,
    MAX_CID,
    MIN_GUEST_CID,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    WRAP,
    Header,
    Op,
)
from voidbus.vm.devices.vsock_stats import VsockStats
from voidbus.vm.devices.vsock_to_guest import ToGuest

MAX_CONNECTIONS = 1024
"""Connections at one time; the guest's next one is reset, the host's is closed."""
CONNECT_SECONDS = 5.0
"""How long the guest may take to accept a connection."""
DRAIN_SECONDS = 30.0
"""How long the host's reader may take for the rest of a stream that the guest has closed."""
CLOSE_SECONDS = 10.0
"""How long the guest may keep a connection that the host has closed (Linux takes 8 s)."""
ALL_WINDOWS = 64 * WINDOW
"""What full windows may add up to; connections beyond get a small one."""

RX, TX, EVENT = 0, 1, 2
"""The queues (5.10.2). The event queue is kept and never used: nothing resets the transport."""

_FIRST_PORT = 1 << 30
_SWEEP_SECONDS = 1.0

OpenPort = Callable[[int], socket.socket]
"""Connects to what the host has behind a port. Must not wait. Raises OSError: refused."""


class VsockDevice(VirtioDevice):
    """Streams of one guest.

    The guest's connections to CID 2 go where ``open_port`` leads; ``connect`` makes one to the
    guest. Flow control is by credit in both directions: of each stream the guest may be at most
    ``WINDOW`` ahead of its reader, and the host is read only when the guest has given credit
    and has buffers for it. Data go between guest memory and sockets without a stop in between.

    Everything belongs to the loop's thread, but ``stats``, which anybody may read.
    """

    device_id: ClassVar[int] = 19

    def __init__(self, guest_cid: int, open_port: OpenPort) -> None:
        """Raises ValueError for a CID no guest may have (below 3)."""
        if not MIN_GUEST_CID <= guest_cid <= MAX_CID:
            raise ValueError(f"no guest may have CID {guest_cid}; use one from 3 to {MAX_CID}")
        self.queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, QUEUE_SIZE)
        self.features = RING_FEATURES | F_STREAM
        self.stats = VsockStats()
        self._guest_cid = guest_cid
        self._open_port = open_port
        self._to_guest = ToGuest(guest_cid, self.stats, self._moved)
        self._first = FirstRequests(self._ask_again)
        self._tx: Virtqueue | None = None
        self._connections: dict[tuple[int, int], Connection] = {}
        self._draining: set[Connection] = set()
        """Streams the guest has done with, and the host's reader not."""
        self._ports = itertools.count()
        self._windows = 0
        self._tx_later = False
        self._tx_held = False
        self._sweeping = False
        self._closed = False

    # -- the transport's ------------------------------------------------------------------

    def attach(self, loop: EventLoop) -> None:
        self._loop = loop
        self._first.attach(loop)

    def config(self) -> bytes:
        return struct.pack("<Q", self._guest_cid)

    def queue_started(self, index: int, queue: Virtqueue) -> None:
        if index == RX:
            self._to_guest.start(queue)
            self._first.driver_is_up()
        elif index == TX:
            self._tx = queue

    def queue_stopped(self, index: int) -> None:
        if index == RX:
            self._to_guest.stop()
        elif index == TX:
            self._tx = None

    def queue_notified(self, index: int) -> None:
        if index == RX:
            self._to_guest.serve()
            self._flush()
        elif index == TX:
            self._serve_tx()

    def reset(self) -> None:
        for connection in [*self._connections.values(), *self._draining]:
            self._forget(connection)
        self._to_guest.clear()
        self._first.reset()
        self._tx_held = False

    def close(self) -> None:
        self._closed = True
        self.reset()

    # -- connections ----------------------------------------------------------------------

    def connect(
        self,
        port: int,
        sock: socket.socket,
        on_accepted: Callable[[int], bool] | None = None,
    ) -> None:
        """Connect ``sock``, which is the device's from now on, to a port of the guest. When the
        guest accepts, ``on_accepted`` is given the host's port, and says False to give up. A
        refusal, or no answer in CONNECT_SECONDS, closes the socket."""
        if self._closed or self._full or not 0 <= port <= WRAP:
            self.stats.refused += 1
            sock.close()
            return
        local_port = self._free_port(port)
        connection = self._add(sock, local_port, port)
        connection.on_accepted = on_accepted
        self._expire(connection, CONNECT_SECONDS)
        self._to_guest.owe(connection, Owed.REQUEST)
        self._first.asked(connection)
        self._watch(connection)
        self._flush()

    def _ask_again(self, connections: list[Connection]) -> None:
        for connection in connections:
            connection.repeated = True
            self._to_guest.owe(connection, Owed.REQUEST)
        self._flush()

    def _free_port(self, peer_port: int) -> int:
        while True:
            port = _FIRST_PORT | next(self._ports) & (_FIRST_PORT - 1)
            if (port, peer_port) not in self._connections:
                return port

    @property
    def _full(self) -> bool:
        return len(self._connections) + len(self._draining) >= MAX_CONNECTIONS

    def _add(self, sock: socket.socket, local_port: int, peer_port: int) -> Connection:
        window = WINDOW if self._windows + WINDOW <= ALL_WINDOWS else SMALL_WINDOW
        self._windows += window
        connection = Connection(sock, local_port, peer_port, window)
        self._connections[local_port, peer_port] = connection
        self.stats.connections += 1
        return connection

    def _forget(self, connection: Connection) -> None:
        """Close a connection on the host's side; the guest is not told."""
        if connection.closed:
            return
        connection.closed = True
        if connection in self._draining:
            self._draining.remove(connection)
        else:
            del self._connections[connection.local_port, connection.peer_port]
        self._to_guest.forget(connection)
        if connection.events >= 0:
            self._loop.unwatch(connection.sock.fileno())
        connection.sock.close()
        connection.backlog = bytearray()
        self._windows -= connection.window
        self.stats.connections -= 1
        if not connection.accepted:
            self.stats.refused += 1

    def _reset(self, connection: Connection) -> None:
        """Close a connection on both sides."""
        # A guest that was not asked yet need not be told.
        told = connection not in self._draining and not connection.owed & Owed.REQUEST
        self._forget(connection)
        if told:
            self._to_guest.owe_reset(
                connection.local_port, connection.peer_port, forwarded=connection.forwarded
            )

    def _break(self, connection: Connection) -> None:
        """The same, for one that should not have ended like that."""
        self.stats.resets += connection.accepted
        self._reset(connection)

    def _expire(self, connection: Connection, seconds: float) -> None:
        connection.deadline = time.monotonic() + seconds
        self._sweep_later()

    def _sweep_later(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._loop.later(_SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Once a second while anything has a deadline, or waits for the guest's credit."""
        self._sweeping = False
        now = time.monotonic()
        again = False
        for connection in [*self._connections.values(), *self._draining]:
            if connection.deadline is not None and connection.deadline <= now:
                self._break(connection)
                continue
            again |= connection.deadline is not None or connection.stalled
            if connection.stalled and not connection.asked:
                # It may be a driver that tells of its credit only when asked (5.10.6.3).
                connection.asked = True
                self._to_guest.owe(connection, Owed.CREDIT_REQUEST)
        if again:
            self._sweep_later()
        self._flush()

    # -- from the guest -------------------------------------------------------------------

    def _serve_tx(self) -> None:
        queue = self._tx
        if queue is None:
            return
        queue.disable_notifications()
        for _ in range(queue.size):
            if self._to_guest.choked:
                self._tx_held = True  # until the guest takes what it has brought about
                break
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    continue
                break
            self._take(chain)
            queue.push(chain, 0)
        else:
            self._serve_tx_later()
        queue.notify()
        self._flush()

    def _serve_tx_later(self) -> None:
        if not self._tx_later:
            self._tx_later = True
            self._loop.soon(self._serve_tx_now)

    def _serve_tx_now(self) -> None:
        self._tx_later = False
        self._serve_tx()

    def _take(self, chain: Chain) -> None:
        self.stats.packets_from_guest += 1
        self._first.heard()
        if chain.readable_bytes < HEADER.size:
            self.stats.dropped += 1
            return
        # Copied once, before it is looked at: the guest may write to it meanwhile.
        first = chain.readable[0]
        if len(first) < HEADER.size:
            first = memoryview(chain.read(HEADER.size))
        header = Header._make(HEADER.unpack_from(first))
        if header.src_cid != self._guest_cid or header.dst_cid != HOST_CID:
            self.stats.dropped += 1
            return
        connection = self._connections.get((header.dst_port, header.src_port))
        if connection is None or header.type != TYPE_STREAM:
            self._take_new(header)
            return
        connection.peer_alloc = header.buf_alloc
        connection.peer_forwarded = header.fwd_cnt
        if header.op == Op.RW and connection.accepted:
            self._take_data(connection, header.length, chain)
        elif header.op == Op.RST:
            self._take_reset(connection)
        elif not connection.accepted:
            self._take_answer(connection, header.op)
        else:
            self._take_word(connection, header)
        if connection.stalled and connection.credit:
            connection.stalled = connection.asked = False
            self._watch(connection)

    def _take_word(self, connection: Connection, header: Header) -> None:
        """What carries no data, on a connection that stands."""
        if header.op == Op.SHUTDOWN:
            self._take_shutdown(connection, header.flags)
        elif header.op == Op.CREDIT_REQUEST:
            self._to_guest.owe(connection, Owed.CREDIT_UPDATE)
        elif header.op == Op.RESPONSE and connection.repeated:
            pass  # asked twice, answered twice
        elif header.op != Op.CREDIT_UPDATE:
            self._break(connection)

    def _take_new(self, header: Header) -> None:
        """A packet of no connection: it asks for one, or is answered by a reset."""
        if header.op == Op.RST:
            self.stats.dropped += 1
            return
        if header.op == Op.REQUEST and header.type == TYPE_STREAM and not self._full:
            try:
                sock = self._open_port(header.dst_port)
            except OSError:
                pass
            else:
                connection = self._add(sock, header.dst_port, header.src_port)
                connection.accepted = True
                connection.peer_alloc = header.buf_alloc
                connection.peer_forwarded = header.fwd_cnt
                self._to_guest.owe(connection, Owed.RESPONSE)
                return
        self.stats.refused += header.op == Op.REQUEST
        self._to_guest.owe_reset(header.dst_port, header.src_port, header.type)

    def _take_answer(self, connection: Connection, op: int) -> None:
        """What the guest says to a request of the host."""
        if op != Op.RESPONSE or connection.owed & Owed.REQUEST:
            self._reset(connection)  # nonsense, or the answer to what it has not been asked
            return
        connection.accepted = True
        connection.deadline = None
        if connection.on_accepted is not None and not connection.on_accepted(connection.local_port):
            self._break(connection)
            return
        self._watch(connection)

    def _take_data(self, connection: Connection, length: int, chain: Chain) -> None:
        unread = connection.received - connection.forwarded
        if (
            length > chain.readable_bytes - HEADER.size
            or connection.guest_done
            or unread + length > connection.window
        ):
            self._break(connection)
            return
        if not length:
            return
        self.stats.bytes_from_guest += length
        if not connection.host_deaf:
            connection.forward(chain.readable_from(HEADER.size, length), length)
            if connection.backlog or connection.host_deaf:
                self._moved(connection)
        else:
            # On its way before the guest knew that nobody reads.
            connection.received += length
            connection.forwarded += length
        self._update_credit(connection)

    def _update_credit(self, connection: Connection) -> None:
        if connection.forwarded - connection.told < connection.window // 2:
            return
        if connection not in self._draining:
            self._to_guest.owe(connection, Owed.CREDIT_UPDATE)

    def _take_shutdown(self, connection: Connection, flags: int) -> None:
        if flags & SHUTDOWN_RECEIVE and not connection.guest_deaf:
            connection.guest_deaf = True
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RD)
        if flags & SHUTDOWN_SEND:
            connection.guest_done = True
        if connection.guest_done and connection.guest_deaf:
            self._expire(connection, DRAIN_SECONDS)
        self._pass_end_on(connection)
        self._moved(connection)

    def _pass_end_on(self, connection: Connection) -> None:
        """Once all that the guest has sent is handed on, hand on that there is no more."""
        if not connection.guest_done or connection.backlog or connection.closed:
            return
        if connection in self._draining:
            self._forget(connection)
        elif connection.guest_deaf:
            self._reset(connection)  # both directions are done, which a reset confirms (5.10.6.6)
        else:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)

    def _take_reset(self, connection: Connection) -> None:
        if not (connection.guest_done and connection.backlog):
            ended = connection.guest_done or (connection.host_done and connection.host_deaf)
            self.stats.resets += connection.accepted and not ended
            self._forget(connection)
            return
        # It has ended its stream in good order and waits no longer. The reader still may.
        del self._connections[connection.local_port, connection.peer_port]
        self._draining.add(connection)
        self._to_guest.forget(connection)
        connection.guest_deaf = True
        connection.waiting = connection.stalled = False
        self._expire(connection, DRAIN_SECONDS)
        self._watch(connection)

    # -- from the host --------------------------------------------------------------------

    def _ready(self, connection: Connection, events: int) -> None:
        """A socket can be read or written, or its other end is gone."""
        if events & HANGUP:
            connection.hung = True
        if not connection.accepted:
            self._reset(connection)  # gone before the guest has answered
        if connection.backlog and events & (WRITE | HANGUP):
            self._drain(connection)
        if connection.may_read:
            self._to_guest.read(connection)
        self._moved(connection)
        self._flush()

    def _drain(self, connection: Connection) -> None:
        connection.flush()
        self._update_credit(connection)
        self._pass_end_on(connection)

    def _moved(self, connection: Connection) -> None:
        """Act on what became of a connection, and wait for what it needs now."""
        if connection.closed:
            return
        if connection.hung and (connection.host_done or connection.guest_deaf):
            connection.host_done = connection.host_deaf = True
        end = (connection.host_done, connection.host_deaf)
        if end != connection.end and connection not in self._draining:
            connection.end = end
            self._to_guest.owe(connection, Owed.SHUTDOWN)
            if all(end):
                self._expire(connection, CLOSE_SECONDS)
        self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        if connection.closed:
            return
        if connection.stalled:
            self._sweep_later()
        wanted = connection.wanted
        if wanted == connection.events:
            return
        fd = connection.sock.fileno()
        if wanted < 0:
            self._loop.unwatch(fd)
        elif connection.events < 0:
            self._loop.watch(fd, wanted, lambda events: self._ready(connection, events))
        else:
            self._loop.change(fd, wanted)
        connection.events = wanted

    def _flush(self) -> None:
        """Send what is owed. If the guest was held up by that, listen to it again."""
        self._to_guest.flush()
        if self._tx_held and not self._to_guest.choked:
            self._tx_held = False
            self._serve_tx_later()
