"""Guest memory: one sealed memfd, mapped here and given to KVM, with a hole for devices."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from typing import NamedTuple

from voidbus.vm.devices.memory import PAGE, GuestMemory, MemoryRegion, SharedRegion

LOW_END = 0xC000_0000
"""Where memory below 4 GiB ends at the latest. Above are devices, and the APICs' own addresses
(0xFEC00000 and on); so PC firmware lays it out, and Linux takes whatever the e820 map says."""
HIGH_START = 0x1_0000_0000
"""Where memory goes on that has no room below."""


_FIXED_PRIVATE = mmap.MAP_PRIVATE | 0x10
"""With MAP_FIXED (mmap(2); x86's number): over what is mapped there."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_int64,
]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Slot(NamedTuple):
    """A piece of guest memory, and its address in this process."""

    address: int
    size: int
    host_address: int


class Ram:
    """``size`` bytes of guest memory from address 0 on. Owns the memfd and its mappings."""

    def __init__(self, size: int) -> None:
        """``size`` in bytes, whole pages. Raises OSError, ValueError, GuestMemoryError."""
        if size <= 0 or size % PAGE:
            raise ValueError(f"guest memory of {size} bytes is not a number of pages")
        self.size = size
        self.fd = os.memfd_create("voidbus-guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self.fd)
            os.ftruncate(self.fd, size)
            # Memory that shrinks under a mapping would be SIGBUS in this process.
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            low = min(size, LOW_END)
            regions = [MemoryRegion.map(self.fd, 0, low, 0)]
            undo.callback(regions[0].close)
            if size > low:
                regions.append(MemoryRegion.map(self.fd, low, size - low, HIGH_START))
            undo.pop_all()
        self.memory = GuestMemory(regions)
        """The same, to read and write under bounds checks."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """What KVM is to be told of it. The addresses hold until ``close``."""
        return tuple(
            Slot(region.address, region.size, region.host_address) for region in self.memory.regions
        )

    @property
    def shared(self) -> tuple[SharedRegion, ...]:
        """What another process is to be told of it, to map it too. It sees no file that is mapped
        privately (``map_file``)."""
        regions, offset = [], 0
        for region in self.memory.regions:
            regions.append(SharedRegion(region.address, region.size, self.fd, offset))
            offset += region.size
        return tuple(regions)

    def map_file(self, file: int, offset: int, size: int, address: int) -> int:
        """Have whole pages of a file at ``address``, privately: the guest's writes stay its own,
        and what no guest writes is in memory once. How many bytes from the start on are there now;
        0 where file and memory do not align. The file must be one that nobody shortens: an access
        past its end would be SIGBUS in this process. Raises GuestMemoryError, OSError."""
        view = self.memory.view(address, size)
        whole = size // PAGE * PAGE
        if offset % PAGE or address % PAGE or not whole:
            return 0
        place = ctypes.addressof(ctypes.c_char.from_buffer(view))
        mapped = _libc.mmap(
            place, whole, mmap.PROT_READ | mmap.PROT_WRITE, _FIXED_PRIVATE, file, offset
        )
        if mapped != place:
            number = ctypes.get_errno()
            raise OSError(number, f"mmap: {os.strerror(number)}")
        # A core of this process is not the place for a guest's secrets.
        _libc.madvise(place, whole, mmap.MADV_DONTDUMP)
        return whole

    def close(self) -> None:
        """Unmap and free; no vCPU may run any more. Again is fine."""
        self.memory.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
