"""The block device (virtio 1.2, section 5.2) over a file of the host: a disk, or a layer."""

from __future__ import annotations

import os
import struct
from typing import ClassVar, Protocol

from voidbus.vm.devices.device import RING_FEATURES, VirtioDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.virtqueue import Chain, Virtqueue

SECTOR = 512
"""The unit of every position and length (5.2.2)."""
MAX_REQUEST = 16 << 20
"""Bytes one request may move; Linux asks for 1.25 MiB at most unless it is told otherwise."""

# Feature bits (5.2.3), request types (5.2.6), status values (5.2.6).
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
T_IN, T_OUT, T_FLUSH, T_GET_ID = 0, 1, 4, 8
S_OK, S_IOERR, S_UNSUPP = 0, 1, 2

_HEADER = struct.Struct("<IIQ")
_QUEUE_SIZE = 256
_SEG_MAX = _QUEUE_SIZE - 2  # a request has a header and a status besides
_ID_BYTES = 20
_CONFIG = struct.Struct("<QIIIII")
_REQUESTS_A_TURN = 32
_PIECES = 512  # of one preadv, well below IOV_MAX


class BlockDevice(VirtioDevice):
    """One disk. A request waits for the host's disk, so the loop this is attached to should have
    nothing but disks. A request that can't be done is answered with an error, as by a real disk;
    one that is none ends the device."""

    device_id: ClassVar[int] = 2

    def __init__(self, file: int, identity: str, *, writable: bool = False) -> None:
        """``file`` is a regular file opened for that, owned from now on; what is beyond its last
        whole sector is not seen. ``identity`` is what the guest may ask for, 20 bytes at most.
        Raises OSError."""
        self.queue_sizes = (_QUEUE_SIZE,)
        self.features = RING_FEATURES | F_SEG_MAX | F_BLK_SIZE | F_FLUSH
        if not writable:
            self.features |= F_RO
        self._file = file
        self._writable = writable
        self._sectors = os.fstat(file).st_size // SECTOR
        self._identity = identity.encode()[:_ID_BYTES].ljust(_ID_BYTES, b"\0")
        self._queue: Virtqueue | None = None
        self._later = False

    def attach(self, loop: EventLoop) -> None:
        self._loop = loop

    def config(self) -> bytes:
        return _CONFIG.pack(self._sectors, 0, _SEG_MAX, 0, SECTOR, 0)

    def queue_started(self, index: int, queue: Virtqueue) -> None:
        self._queue = queue

    def queue_stopped(self, index: int) -> None:
        self._queue = None

    def queue_notified(self, index: int) -> None:
        queue = self._queue
        if queue is None:
            return
        queue.disable_notifications()
        for _ in range(_REQUESTS_A_TURN):
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    break
                queue.notify()
                return
            queue.push(chain, self._serve(chain))
        queue.notify()
        if not self._later:
            self._later = True
            self._loop.soon(self._go_on)

    def _go_on(self) -> None:
        self._later = False
        self.queue_notified(0)

    def _serve(self, chain: Chain) -> int:
        """Do one request; the bytes written for it, its status among them."""
        room = chain.writable_bytes - 1
        header = chain.read(_HEADER.size)
        if len(header) < _HEADER.size or room < 0:
            raise DeviceError(
                f"a block request of {chain.readable_bytes} bytes to read and "
                f"{chain.writable_bytes} to write"
            )
        kind, _, sector = _HEADER.unpack(header)
        try:
            written = self._do(kind, sector, chain, room)
            status = S_OK
        except _Unsupported:
            written, status = 0, S_UNSUPP
        except OSError:
            written, status = 0, S_IOERR
        chain.write(bytes([status]), room)
        # What counts is from the first byte on, and the status is the last.
        return room + 1 if written == room else 0

    def _do(self, kind: int, sector: int, chain: Chain, room: int) -> int:
        """The bytes written but for the status. Raises OSError, _Unsupported."""
        if kind == T_IN:
            self._check(sector, room)
            self._move(os.preadv, chain.writable_from(0, room), sector * SECTOR)
            return room
        if kind == T_OUT and self._writable:
            size = chain.readable_bytes - _HEADER.size
            self._check(sector, size)
            self._move(os.pwritev, chain.readable_from(_HEADER.size, size), sector * SECTOR)
            return room
        if kind == T_FLUSH:
            if self._writable:
                os.fdatasync(self._file)
            return room
        if kind == T_GET_ID:
            chain.write(self._identity[:room])
            return room
        raise _Unsupported

    def _check(self, sector: int, size: int) -> None:
        if size % SECTOR or size > MAX_REQUEST or sector + size // SECTOR > self._sectors:
            raise OSError("outside of the disk")

    def _move(self, call: _Move, views: list[memoryview], position: int) -> None:
        for start in range(0, len(views), _PIECES):
            part = views[start : start + _PIECES]
            wanted = sum(map(len, part))
            if call(self._file, part, position) != wanted:
                raise OSError("the file became shorter, or its disk is full")
            position += wanted

    def reset(self) -> None:
        pass

    def close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


class _Unsupported(Exception):
    """A kind of request there is not."""


class _Move(Protocol):
    """os.preadv or os.pwritev."""

    def __call__(self, fd: int, buffers: list[memoryview], offset: int, /) -> int: ...
