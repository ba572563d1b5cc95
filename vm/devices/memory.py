"""Guest memory as this process sees it: mapped files, read and written under bounds checks."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

from voidbus.vm.devices.faults import GuestMemoryError

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("virtio 1.x is little-endian, and so are the hosts these devices run on")

PAGE = mmap.PAGESIZE


class MemoryRegion:
    """``size`` bytes of guest memory from guest physical ``address`` on, backed by ``mapping``
    from its byte ``skip`` on. Owns the mapping."""

    __slots__ = ("_mapping", "address", "size", "view")

    def __init__(self, address: int, size: int, mapping: mmap.mmap, skip: int = 0) -> None:
        self.address = address
        self.size = size
        self.view = memoryview(mapping)[skip : skip + size]
        if len(self.view) != size:
            raise GuestMemoryError(f"a mapping of {len(mapping)} bytes can't hold {size}")
        self._mapping = mapping

    @classmethod
    def map(cls, fd: int, offset: int, size: int, address: int) -> MemoryRegion:
        """Map ``size`` bytes of a file, shared, from ``offset``. ``fd`` stays the caller's.

        The file must be one that can't shrink (sealed with F_SEAL_SHRINK, memfd_create(2)): an
        access past the end of a file is SIGBUS, which would end this process and not the guest's
        run. Raises GuestMemoryError.
        """
        if size <= 0 or offset < 0 or address < 0 or address + size > 1 << 64:
            raise GuestMemoryError(f"no memory region: {size} bytes at {address:#x}")
        skip = offset % PAGE
        try:
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise GuestMemoryError(
                    "guest memory in a file that may shrink; use a memfd with F_SEAL_SHRINK"
                )
            if os.fstat(fd).st_size < offset + size:
                raise GuestMemoryError(f"a memory region of {size} bytes is larger than its file")
            mapping = mmap.mmap(fd, size + skip, mmap.MAP_SHARED, offset=offset - skip)
        except (OSError, ValueError, OverflowError) as error:
            raise GuestMemoryError(f"guest memory can't be mapped: {error}") from error
        # A core of this process is not the place for a guest's secrets.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_DONTDUMP)
        return cls(address, size, mapping, skip)

    @property
    def host_address(self) -> int:
        """Where it begins in this process. It holds until ``close``."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self.view))

    def close(self) -> None:
        """Unmap; put off until the last view into the region is gone, if there are any."""
        self.view.release()
        with contextlib.suppress(BufferError):
            self._mapping.close()


class SharedRegion(NamedTuple):
    """A region for another process to map: ``size`` bytes of guest memory from ``address`` on are
    those of ``file`` from ``offset`` on."""

    address: int
    size: int
    file: int
    offset: int


class GuestMemory:
    """The regions of one guest. Every access is checked: it lies in the regions, or raises
    GuestMemoryError. What is read may change any moment, so it is to be read once, then checked.

    A load or store of 16 or 32 bits at an aligned address is one access of the processor. The
    order of accesses is what x86-64 keeps (loads with loads, stores with stores); where a store
    must be seen before a later load, ``Virtqueue`` puts a fence.
    """

    def __init__(self, regions: Iterable[MemoryRegion]) -> None:
        self._regions = tuple(sorted(regions, key=lambda region: region.address))
        end = 0
        for region in self._regions:
            if region.address < end:
                raise GuestMemoryError(f"memory regions overlap at {region.address:#x}")
            end = region.address + region.size

    @property
    def regions(self) -> tuple[MemoryRegion, ...]:
        """By address."""
        return self._regions

    def view(self, address: int, size: int) -> memoryview:
        """``size`` bytes (1 or more) that lie in one region, to read and write in place."""
        if size > 0:
            for region in self._regions:
                offset = address - region.address
                if offset >= 0 and offset + size <= region.size:
                    return region.view[offset : offset + size]
        raise GuestMemoryError(f"{size} bytes at {address:#x} are not guest memory")

    def slices(self, address: int, size: int) -> list[memoryview]:
        """The same bytes in as many pieces as they touch regions."""
        for region in self._regions:  # nearly always in one, so that is looked for first
            offset = address - region.address
            if offset >= 0 and 0 < size <= region.size - offset:
                return [region.view[offset : offset + size]]
        pieces: list[memoryview] = []
        left = size
        for region in self._regions:
            offset = address - region.address
            if 0 <= offset < region.size and left > 0:
                count = min(left, region.size - offset)
                pieces.append(region.view[offset : offset + count])
                address += count
                left -= count
        if left or not pieces:
            raise GuestMemoryError(f"{size} bytes at {address:#x} are not guest memory")
        return pieces

    def host_address(self, address: int, size: int) -> int:
        """Where ``size`` bytes that lie in one region are in this process, for whoever knows it by
        such addresses (vhost)."""
        for region in self._regions:
            offset = address - region.address
            if offset >= 0 and offset + size <= region.size:
                return region.host_address + offset
        raise GuestMemoryError(f"{size} bytes at {address:#x} are not guest memory")

    def read(self, address: int, size: int) -> bytes:
        """A copy of ``size`` bytes."""
        return b"".join(self.slices(address, size)) if size else b""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes there; all of them or, on GuestMemoryError, none."""
        if not len(data):
            return
        source = memoryview(data)
        done = 0
        for piece in self.slices(address, len(source)):
            piece[:] = source[done : done + len(piece)]
            done += len(piece)

    def load16(self, address: int) -> int:
        return int(self.view(address, 2).cast("H")[0])

    def load32(self, address: int) -> int:
        return int(self.view(address, 4).cast("I")[0])

    def store16(self, address: int, value: int) -> None:
        self.view(address, 2).cast("H")[0] = value & 0xFFFF

    def store32(self, address: int, value: int) -> None:
        self.view(address, 4).cast("I")[0] = value & 0xFFFFFFFF

    def close(self) -> None:
        """Unmap every region. Views still out keep theirs mapped until they are dropped; any
        access by this object raises from now on."""
        regions, self._regions = self._regions, ()
        for region in regions:
            region.close()
