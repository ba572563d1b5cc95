"""The way to the guest: packets that are owed, and data read from the host into its buffers."""

from __future__ import annotations

import collections
from collections.abc import Callable

from voidbus.vm.devices.faults import QueueError
from voidbus.vm.devices.virtqueue import Chain, Virtqueue
from voidbus.vm.devices.vsock_connection import Connection, Owed
from voidbus.vm.devices.vsock_packets import (
    HEADER,
    HOST_CID,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    WRAP,
    Op,
)
from voidbus.vm.devices.vsock_stats import VsockStats

MAX_RESETS = 256
"""Resets that may wait for buffers of the guest; with that many, it is not listened to."""

_MAX_BURST = 16
_MAX_PIECES = 512  # of one readv, well below IOV_MAX

_OPS = {
    Owed.REQUEST: Op.REQUEST,
    Owed.RESPONSE: Op.RESPONSE,
    Owed.CREDIT_UPDATE: Op.CREDIT_UPDATE,
    Owed.CREDIT_REQUEST: Op.CREDIT_REQUEST,
    Owed.SHUTDOWN: Op.SHUTDOWN,
}


class ToGuest:
    """Fills the buffers of the receive queue. What can't go now waits here, bounded: resets by
    MAX_RESETS and the number of connections, all else by the number of connections."""

    def __init__(
        self, guest_cid: int, stats: VsockStats, on_moved: Callable[[Connection], None]
    ) -> None:
        """``on_moved`` is told of a connection that got on without the loop: it may have to be
        watched in another way."""
        self._guest_cid = guest_cid
        self._stats = stats
        self._on_moved = on_moved
        self._queue: Virtqueue | None = None
        self._resets: collections.deque[bytes] = collections.deque()
        self._owing: collections.OrderedDict[Connection, None] = collections.OrderedDict()
        self._waiting: collections.OrderedDict[Connection, None] = collections.OrderedDict()

    def start(self, queue: Virtqueue) -> None:
        self._queue = queue
        queue.disable_notifications()

    def stop(self) -> None:
        self._queue = None

    def clear(self) -> None:
        """Forget what waits."""
        self._resets.clear()
        self._owing.clear()
        self._waiting.clear()

    def forget(self, connection: Connection) -> None:
        """Send nothing more of this connection."""
        connection.owed = 0
        self._owing.pop(connection, None)
        self._waiting.pop(connection, None)

    @property
    def choked(self) -> bool:
        """Whether so many resets wait that nothing more should be asked for."""
        return len(self._resets) >= MAX_RESETS

    # -- packets --------------------------------------------------------------------------

    def owe(self, connection: Connection, packet: int) -> None:
        """Send this (one of Owed) with the next ``flush``, or when there is a buffer."""
        connection.owed |= packet
        self._owing[connection] = None

    def owe_reset(
        self, local_port: int, peer_port: int, kind: int = TYPE_STREAM, forwarded: int = 0
    ) -> None:
        """The same for the reset of a connection that is no longer there, or never was."""
        self._resets.append(
            HEADER.pack(
                HOST_CID,
                self._guest_cid,
                local_port,
                peer_port,
                0,
                kind,
                Op.RST,
                0,
                0,
                forwarded & WRAP,
            )
        )

    def flush(self) -> None:
        """Send the packets that are owed, as far as the guest has buffers for them."""
        queue = self._queue
        if queue is None or not (self._resets or self._owing):
            return
        while self._resets and (chain := self._buffer(queue)) is not None:
            self._put(queue, chain, self._resets.popleft())
        while self._owing and not self._resets:
            connection = next(iter(self._owing))
            if (chain := self._buffer(queue)) is None:
                break
            self._put(queue, chain, self._next_owed(connection))
            if not connection.owed:
                del self._owing[connection]
            self._on_moved(connection)
        queue.notify()

    def _put(self, queue: Virtqueue, chain: Chain, packet: bytes) -> None:
        chain.write(packet)
        queue.push(chain, HEADER.size)
        self._stats.packets_to_guest += 1

    def _next_owed(self, connection: Connection) -> bytes:
        owed = connection.owed
        packet = owed & -owed  # the lowest bit
        connection.owed = owed ^ packet
        connection.told = connection.forwarded
        flags = 0
        if packet == Owed.SHUTDOWN:
            flags = SHUTDOWN_RECEIVE if connection.host_deaf else 0
            flags |= SHUTDOWN_SEND if connection.host_done else 0
        return HEADER.pack(
            HOST_CID,
            self._guest_cid,
            connection.local_port,
            connection.peer_port,
            0,
            TYPE_STREAM,
            _OPS[packet],
            flags,
            connection.window,
            connection.forwarded & WRAP,
        )

    def _buffer(self, queue: Virtqueue) -> Chain | None:
        """The guest's next buffer; if there is none, it is asked to kick."""
        chain = queue.pop()
        if chain is None:
            if not queue.enable_notifications():
                return None
            chain = queue.pop()
        if chain is not None and (chain.readable or chain.writable_bytes <= HEADER.size):
            raise QueueError(
                f"a receive buffer of {chain.writable_bytes} bytes to write and "
                f"{chain.readable_bytes} to read"
            )
        return chain

    # -- data -----------------------------------------------------------------------------

    def serve(self) -> None:
        """The guest has new buffers: first for packets owed, then for whoever waits, in turn."""
        queue = self._queue
        if queue is None:
            return
        queue.disable_notifications()
        self.flush()
        for _ in range(len(self._waiting)):
            connection = next(iter(self._waiting))
            self._waiting.pop(connection)
            connection.waiting = False
            self.read(connection)
            if connection.waiting:
                self._waiting.move_to_end(connection, last=False)  # it keeps its turn
                break
            self._on_moved(connection)

    def read(self, connection: Connection) -> None:
        """Read what the host has sent into the guest's buffers, one readv at most. Marks the
        connection stalled, waiting, or done if that is how it ends."""
        queue = self._queue
        limit = connection.credit
        if not limit:
            connection.stalled = True
            return
        taken, views, room = ([], [], 0) if queue is None else self._take(queue, connection, limit)
        if queue is None or not taken:
            connection.waiting = True
            self._waiting[connection] = None
            return
        try:
            count = connection.sock.recvmsg_into(views)[0]
        except BlockingIOError:
            queue.unpop(len(taken))
            return
        except OSError:
            connection.hung = True
            count = 0
        if not count:
            queue.unpop(len(taken))
            connection.host_done = True
            return
        used = self._give(queue, connection, taken, count)
        queue.unpop(len(taken) - used)
        connection.burst = min(_MAX_BURST, 2 * used) if count == room else used
        queue.notify()

    def _take(
        self, queue: Virtqueue, connection: Connection, limit: int
    ) -> tuple[list[tuple[Chain, int]], list[memoryview], int]:
        """Buffers for the next read, with the room of each, and all together."""
        taken: list[tuple[Chain, int]] = []
        views: list[memoryview] = []
        room = 0
        while room < limit and len(taken) < connection.burst and len(views) < _MAX_PIECES:
            if (chain := self._buffer(queue)) is None:
                break
            size = min(chain.writable_bytes - HEADER.size, limit - room)
            views += chain.writable_from(HEADER.size, size)
            taken.append((chain, size))
            room += size
        return taken, views, room

    def _give(
        self, queue: Virtqueue, connection: Connection, taken: list[tuple[Chain, int]], count: int
    ) -> int:
        """Put headers before ``count`` bytes that were read, and give those buffers back."""
        left = count
        used = 0
        for chain, size in taken:
            length = min(left, size)
            fields = (
                HOST_CID,
                self._guest_cid,
                connection.local_port,
                connection.peer_port,
                length,
                TYPE_STREAM,
                Op.RW,
                0,
                connection.window,
                connection.forwarded & WRAP,
            )
            first = chain.writable[0]
            if len(first) >= HEADER.size:
                HEADER.pack_into(first, 0, *fields)
            else:
                chain.write(HEADER.pack(*fields))
            queue.push(chain, HEADER.size + length)
            used += 1
            left -= length
            if not left:
                break
        connection.sent += count
        connection.told = connection.forwarded
        self._stats.bytes_to_guest += count
        self._stats.packets_to_guest += used
        return used
