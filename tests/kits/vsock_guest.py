"""A guest's socket driver, packet by packet, and a loop that a test turns by itself."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from virtio_driver import DriverQueue, GuestRam

from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.vsock import RX, TX, VsockDevice
from voidbus.vm.devices.vsock_packets import Op

CID = 3
HEADER = struct.Struct("<QQIIIHHIII")
GUEST_WINDOW = 256 * 1024


class Packet(NamedTuple):
    """One that the device sent."""

    op: int
    host_port: int
    guest_port: int
    data: bytes
    flags: int
    buf_alloc: int
    fwd_cnt: int
    type: int


class TurnedLoop(EventLoop):
    """Without a thread: ``settle`` does what there is to do, and fails if that never ends."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        super().__init__("turned", self.failed.append)

    def settle(self, turns: int = 1000) -> int:
        """Turns until nothing is left to do. Returns how many callbacks and tasks it took."""
        work = 0
        for _ in range(turns):
            done = self.turn(0)
            if not done:
                return work
            work += done
        raise AssertionError(f"still busy after {turns} turns: it spins")


ROOM_SECONDS = 20.0
"""How long a full transmit queue may stay so."""


class VsockGuest:
    """The guest's driver: it keeps the receive queue filled and sends whatever it is told."""

    def __init__(
        self,
        ram: GuestRam,
        *,
        size: int = 64,
        event_idx: bool = False,
        indirect: bool = False,
        buffers: tuple[int, ...] = (44, 4096),
        cid: int = CID,
    ) -> None:
        self.cid = cid
        self.rx = DriverQueue(ram, size, event_idx=event_idx)
        self.tx = DriverQueue(ram, size, event_idx=event_idx, indirect=indirect)
        self.buffers = buffers
        self.received: list[Packet] = []

    def fill(self) -> None:
        """Give the device all the receive buffers there is room for."""
        while self.rx.free_descriptors >= len(self.buffers):
            self.rx.add(writable=self.buffers)

    def send(
        self,
        op: int,
        guest_port: int,
        host_port: int,
        data: bytes = b"",
        *,
        flags: int = 0,
        buf_alloc: int = GUEST_WINDOW,
        fwd_cnt: int = 0,
        length: int | None = None,
        kind: int = 1,
        src_cid: int | None = None,
        dst_cid: int = 2,
    ) -> None:
        """Put one packet into the transmit queue, as two descriptors like Linux."""
        header = HEADER.pack(
            self.cid if src_cid is None else src_cid,
            dst_cid,
            guest_port,
            host_port,
            len(data) if length is None else length,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt & 0xFFFFFFFF,
        )
        self._await_room(2 if data else 1)
        self.tx.add(readable=[header, data] if data else [header])

    def _await_room(self, descriptors: int) -> None:
        """As a driver does whose ring is full: wait until the device has taken something."""
        deadline = time.monotonic() + ROOM_SECONDS
        self.tx.collect()
        while self.tx.free < descriptors:
            if time.monotonic() > deadline:
                raise TimeoutError("the device takes nothing from the transmit queue")
            self.tx.kick()
            select.select([self.tx.call_fd], [], [], 0.002)
            self.tx.interrupts()
            self.tx.collect()

    def take(self) -> list[Packet]:
        """What the device has put into receive buffers since the last time."""
        packets = []
        for done in self.rx.collect():
            header = HEADER.unpack(done.data[:44])
            src_cid, dst_cid, host, guest, length, kind, op, flags, alloc, fwd = header
            assert (src_cid, dst_cid) == (2, self.cid)
            assert done.written == 44 + length
            data = done.data[44:]
            packets.append(Packet(op, host, guest, data, flags, alloc, fwd, kind))
        return packets

    def close(self) -> None:
        self.rx.close()
        self.tx.close()


class Bench:
    """A device and its guest on a turned loop, without a transport between them."""

    def __init__(
        self,
        ram: GuestRam,
        guest: VsockGuest,
        open_port: Callable[[int], socket.socket] | None = None,
    ) -> None:
        self.ram = ram
        self.guest = guest
        self.memory = ram.memory()
        self.loop = TurnedLoop()
        self.hosts: dict[int, list[socket.socket]] = {}
        """The host's ends of connections the guest made, by port."""
        self._ours: list[socket.socket] = []
        self.device = VsockDevice(CID, open_port or self._open)
        self.device.attach(self.loop)
        self.loop.at_end(self.device.close)
        self.rx_queue = guest.rx.device_queue(self.memory)
        self.device.queue_started(RX, self.rx_queue)
        self.device.queue_started(TX, guest.tx.device_queue(self.memory))
        self.guest.fill()
        self.device.queue_notified(RX)
        self.device.queue_notified(TX)

    def _open(self, port: int) -> socket.socket:
        if port >= 9000:
            raise ConnectionRefusedError(port)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.hosts.setdefault(port, []).append(ours)
        return theirs

    def host_connects(self, port: int, **options: Callable[[int], bool]) -> socket.socket:
        """A program of the host connects to a port of the guest."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._ours.append(ours)
        self.device.connect(port, theirs, **options)
        return ours

    def kick(self) -> bool:
        """Kick as far as the device wants it, and whether it did."""
        tx, rx = self.guest.tx.kick(), self.guest.rx.kick()
        if tx:
            self.device.queue_notified(TX)
        if rx:
            self.device.queue_notified(RX)
        return tx or rx

    def settle(self, *, fill: bool = True) -> list[Packet]:
        """Let both sides do all they can. The packets the guest got."""
        got: list[Packet] = []
        for _ in range(10_000):
            if fill:
                self.guest.fill()
            self.kick()
            work = self.loop.settle()
            packets = self.guest.take()
            got += packets
            self.guest.tx.collect()
            if not work and not packets:
                return got
        raise AssertionError("device and guest never come to rest")

    def accept(
        self, guest_port: int, host_port: int, buf_alloc: int = GUEST_WINDOW, fwd_cnt: int = 0
    ) -> socket.socket:
        """The guest connects to a port of the host; the host's end."""
        self.guest.send(Op.REQUEST, guest_port, host_port, buf_alloc=buf_alloc, fwd_cnt=fwd_cnt)
        (answer,) = self.settle()
        assert answer[:3] == (Op.RESPONSE, host_port, guest_port)
        return self.hosts[host_port][-1]

    def close(self) -> None:
        self.loop.close()
        self.memory.close()
        self.guest.close()
        for socks in (self._ours, *self.hosts.values()):
            for sock in socks:
                sock.close()


@contextlib.contextmanager
def bench(**options: bool | int) -> Iterator[Bench]:
    """A device with a guest of 4 MiB; ``options`` are those of VsockGuest."""
    ram = GuestRam()
    made = Bench(ram, VsockGuest(ram, **options))  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()
        ram.close()
