"""A guest's half of virtio: memory, a driver for split queues as Linux has one, and a vhost-user
front end as QEMU is one. All of it in the test's process, on real memory and real descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from voidbus.vm.devices.memory import GuestMemory, MemoryRegion, SharedRegion
from voidbus.vm.devices.virtqueue import RingAddresses, Virtqueue

WAIT = 10.0
"""Seconds a test waits for what must come."""

USER_BASE = 0x7F00_0000_0000
"""Where the front end claims to have mapped the memory: its addresses are not the guest's."""

F_VERSION_1 = 1 << 32
F_EVENT_IDX = 1 << 29
F_INDIRECT_DESC = 1 << 28
F_PROTOCOL_FEATURES = 1 << 30

_DESCRIPTOR = struct.Struct("<QIHH")


class GuestRam:
    """Guest memory in a sealed memfd, mapped here as the guest sees it."""

    def __init__(self, size: int = 1 << 22, address: int = 0) -> None:
        self.size = size
        self.address = address
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.map = mmap.mmap(self.fd, size)
        self._next = 4096
        self._free: dict[int, list[int]] = {}

    def memory(self) -> GuestMemory:
        """A device's view of it. The caller closes it."""
        return GuestMemory([MemoryRegion.map(self.fd, 0, self.size, self.address)])

    @property
    def shared(self) -> tuple[SharedRegion, ...]:
        """What another process is to be told of it."""
        return (SharedRegion(self.address, self.size, self.fd, 0),)

    def alloc(self, size: int, alignment: int = 16) -> int:
        """A guest physical address of ``size`` bytes nobody else has."""
        room = 1 << max(size - 1, 15).bit_length()
        if alignment <= 16 and self._free.get(room):
            return self._free[room].pop()
        start = -(-self._next // alignment) * alignment
        if start + room > self.size:
            raise MemoryError(f"guest memory of {self.size} bytes is full")
        self._next = start + room
        return self.address + start

    def free(self, address: int, size: int) -> None:
        self._free.setdefault(1 << max(size - 1, 15).bit_length(), []).append(address)

    def read(self, address: int, size: int) -> bytes:
        start = address - self.address
        return self.map[start : start + size]

    def write(self, address: int, data: bytes) -> None:
        start = address - self.address
        self.map[start : start + len(data)] = data

    def close(self) -> None:
        if self.fd >= 0:
            self.map.close()
            os.close(self.fd)
            self.fd = -1


class Done(NamedTuple):
    """A chain the device gave back."""

    token: int
    written: int
    data: bytes
    """The first ``written`` bytes of what was writable."""


class _Request(NamedTuple):
    head: int
    descriptors: list[int]
    buffers: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    table: tuple[int, int] | None


class DriverQueue:
    """One queue, driven by the rules; tests that break them write into ``ram`` themselves."""

    def __init__(
        self, ram: GuestRam, size: int = 16, *, event_idx: bool = False, indirect: bool = False
    ) -> None:
        self.ram = ram
        self.size = size
        self.event_idx = event_idx
        self.indirect = indirect
        self.desc = ram.alloc(16 * size, 16)
        self.avail = ram.alloc(6 + 2 * size, 16)
        self.used = ram.alloc(6 + 8 * size, 16)
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fence = threading.Lock()
        self.kicks = 0
        """Kicks really sent."""
        self.restart()

    def restart(self) -> None:
        """What a driver does when it takes the device again: empty rings."""
        ram = self.ram
        ram.write(self.desc, bytes(16 * self.size))
        ram.write(self.avail, bytes(6 + 2 * self.size))
        ram.write(self.used, bytes(6 + 8 * self.size))
        self.avail_index = 0
        self.used_seen = 0
        self.kicked_at = 0
        self._free = list(range(self.size))
        self._requests: dict[int, _Request] = {}

    @property
    def addresses(self) -> RingAddresses:
        return RingAddresses(self.desc, self.avail, self.used)

    def device_queue(self, memory: GuestMemory, index: int = 0) -> Virtqueue:
        """The device's half, without a transport between."""
        return Virtqueue(
            memory,
            self.size,
            self.addresses,
            lambda: os.eventfd_write(self.call_fd, 1),
            event_idx=self.event_idx,
            indirect=self.indirect,
            index=index,
        )

    # -- giving ---------------------------------------------------------------------------

    @property
    def free_descriptors(self) -> int:
        return len(self._free)

    def write_descriptor(
        self, index: int, address: int, length: int, flags: int, following: int = 0
    ) -> None:
        self.ram.write(self.desc + 16 * index, _DESCRIPTOR.pack(address, length, flags, following))

    def make_available(self, head: int) -> None:
        """Put a chain into the available ring, whatever it is."""
        slot = self.avail + 4 + 2 * (self.avail_index % self.size)
        self.ram.write(slot, struct.pack("<H", head))
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self.ram.write(self.avail + 2, struct.pack("<H", self.avail_index))

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = ()) -> int:
        """Make a chain of these contents and these room sizes available, without a kick.
        Returns its token."""
        buffers: list[tuple[int, int, int]] = []
        for data in readable:
            address = self.ram.alloc(len(data))
            self.ram.write(address, data)
            buffers.append((address, len(data), 0))
        buffers += [(self.ram.alloc(room), room, 2) for room in writable]
        if self.indirect and len(buffers) > 1:
            head = self._free.pop()
            size = 16 * len(buffers)
            table = (self.ram.alloc(size), size)
            for number, (address, length, flags) in enumerate(buffers):
                more = number + 1 < len(buffers)
                entry = _DESCRIPTOR.pack(address, length, flags | more, number + 1 if more else 0)
                self.ram.write(table[0] + 16 * number, entry)
            self.write_descriptor(head, *table, 4)
            used, at = [head], table
        else:
            used, at = [self._free.pop() for _ in buffers], None
            for number, (address, length, flags) in enumerate(buffers):
                more = number + 1 < len(buffers)
                following = used[number + 1] if more else 0
                self.write_descriptor(used[number], address, length, flags | more, following)
        plain = [(address, length) for address, length, _ in buffers]
        room_of = [(address, length) for address, length, flags in buffers if flags]
        self._requests[used[0]] = _Request(used[0], used, plain, room_of, at)
        self.make_available(used[0])
        return used[0]

    @property
    def free(self) -> int:
        """Descriptors no chain uses."""
        return len(self._free)

    def kick(self, *, always: bool = False) -> bool:
        """Notify the device of what is new, if it wants that. Whether it did."""
        new, old = self.avail_index, self.kicked_at
        self.kicked_at = new
        with self._fence:
            pass  # the device sees the entry before its wishes are read here
        if self.event_idx:
            event = self._word(self.used + 4 + 8 * self.size)
            wanted = (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
        else:
            wanted = new != old and not self._word(self.used) & 1
        if wanted or always:
            self.kicks += 1
            os.eventfd_write(self.kick_fd, 1)
        return wanted

    # -- taking ---------------------------------------------------------------------------

    def collect(self) -> list[Done]:
        """What the device has given back since the last time; asks for the next interrupt."""
        done = []
        while True:
            while self.used_seen != self._word(self.used + 2):
                at = self.used + 4 + 8 * (self.used_seen % self.size)
                head, written = struct.unpack("<II", self.ram.read(at, 8))
                self.used_seen = (self.used_seen + 1) & 0xFFFF
                done.append(self._finish(head, written))
            if not self.event_idx:
                return done
            self.ram.write(self.avail + 4 + 2 * self.size, struct.pack("<H", self.used_seen))
            with self._fence:
                pass  # the device sees the wish before its index is read again
            if self.used_seen == self._word(self.used + 2):
                return done

    def _finish(self, head: int, written: int) -> Done:
        request = self._requests.pop(head)  # a KeyError is a chain the device invented
        data = b"".join(self.ram.read(address, room) for address, room in request.writable)
        if written > len(data):
            raise AssertionError(f"{written} bytes written into {len(data)}")
        for address, size in request.buffers:
            self.ram.free(address, size)
        if request.table is not None:
            self.ram.free(*request.table)
        self._free += request.descriptors
        return Done(head, written, data[:written])

    def wait(self, seconds: float = WAIT) -> list[Done]:
        """The same, waiting for an interrupt until there is something."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.call_fd, select.POLLIN)
        while not (done := self.collect()):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                raise TimeoutError("the device gave nothing back")
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.call_fd)
        return done

    def suppress_interrupts(self, yes: bool) -> None:
        """Set or clear VIRTQ_AVAIL_F_NO_INTERRUPT."""
        self.ram.write(self.avail, struct.pack("<H", int(yes)))

    def interrupts(self) -> int:
        """Interrupts sent since the last time this was asked."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def _word(self, address: int) -> int:
        return int.from_bytes(self.ram.read(address, 2), "little")

    def close(self) -> None:
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
            os.close(self.call_fd)
            self.kick_fd = self.call_fd = -1


class VhostUserFrontEnd:
    """QEMU's half of vhost-user: speaks to a back end listening at ``path``."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(WAIT)
        self.sock.connect(str(path))

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1
    ) -> None:
        data = struct.pack("<III", request, flags, len(payload)) + payload
        if fds:
            socket.send_fds(self.sock, [data], list(fds))
        else:
            self.sock.sendall(data)

    def receive(self) -> tuple[int, bytes]:
        """The next answer: its request and payload. ConnectionError if the back end is gone."""
        request, _, size = struct.unpack("<III", self._exactly(12))
        return request, self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise ConnectionError("the back end closed")
            data += more
        return data

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        answered, content = self.receive()
        assert answered == request
        return content

    def do(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send, and wait until the back end has acted on it."""
        self.send(request, payload, fds, flags=9)
        answered, content = self.receive()
        assert (answered, content) == (request, bytes(8))

    # -- what QEMU does -------------------------------------------------------------------

    def start(self, ram: GuestRam, queues: Sequence[DriverQueue], features: int = 0) -> None:
        """Negotiate and start all queues; ``features`` besides those the queues use."""
        features |= F_VERSION_1 | F_PROTOCOL_FEATURES
        if any(queue.event_idx for queue in queues):
            features |= F_EVENT_IDX
        if any(queue.indirect for queue in queues):
            features |= F_INDIRECT_DESC
        offered = int.from_bytes(self.ask(1), "little")
        assert features & ~offered == 0, f"{features & ~offered:#x} is not offered"
        self.ask(15)
        self.send(16, struct.pack("<Q", 1 << 0 | 1 << 3 | 1 << 9))
        self.do(3)
        self.do(2, struct.pack("<Q", features))
        self.set_memory(ram)
        for number, queue in enumerate(queues):
            self.start_queue(number, queue)

    def set_memory(self, ram: GuestRam) -> None:
        table = struct.pack("<IIQQQQ", 1, 0, ram.address, ram.size, USER_BASE, 0)
        self.do(5, table, [ram.fd])

    def start_queue(self, number: int, queue: DriverQueue, index: int = 0) -> None:
        self.do(8, struct.pack("<II", number, queue.size))
        self.do(10, struct.pack("<II", number, index))
        desc, used, avail = (
            USER_BASE + address - queue.ram.address
            for address in (queue.desc, queue.used, queue.avail)
        )
        self.do(9, struct.pack("<IIQQQQ", number, 0, desc, used, avail, 0))
        self.do(12, struct.pack("<Q", number), [queue.kick_fd])
        self.do(13, struct.pack("<Q", number), [queue.call_fd])
        self.do(18, struct.pack("<II", number, 1))

    def stop_queue(self, number: int) -> int:
        """Stop a queue; its next available entry."""
        _, index = struct.unpack("<II", self.ask(11, struct.pack("<II", number, 0)))
        return int(index)

    def config(self, size: int, offset: int = 0) -> bytes:
        header = struct.pack("<III", offset, size, 0)
        return self.ask(24, header + bytes(size))[12:]

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def guest_ram(size: int = 1 << 22, address: int = 0) -> Iterator[GuestRam]:
    ram = GuestRam(size, address)
    try:
        yield ram
    finally:
        ram.close()
