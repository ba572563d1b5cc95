"""A kernel as a file: what of it goes where in guest memory, and its 64-bit entry.

Both kinds are entered alike, with a zero page (Linux `Documentation/arch/x86/boot.rst`, "64-bit
Boot Protocol"): an ELF vmlinux at its own entry, a bzImage 0x200 bytes behind its start.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

ELF_MAGIC = b"\x7fELF"

HEADER_START = 0x1F1
"""Where the setup header is, in a bzImage and in the zero page alike."""
HEADER_ROOM = 0x280 - HEADER_START
"""As much as the zero page has room for."""

_MAX_SEGMENTS = 64
_HEAD_BYTES = 0x1000
_LOW = 0x10_0000
_TOP = 1 << 46  # more than any machine has
_PT_LOAD = 1
_EM_X86_64 = 62
_64_BIT = 1 << 0  # XLF_KERNEL_64
_PROTOCOL = 0x20C
"""The first protocol with a 64-bit entry."""


class KernelError(ValueError):
    """The file is no kernel that can be booted: why, and what to give."""


class Segment(NamedTuple):
    """``file_size`` bytes from ``offset`` of the file on, at ``address``, and zeros up to
    ``memory_size``."""

    offset: int
    file_size: int
    address: int
    memory_size: int

    @property
    def end(self) -> int:
        return self.address + self.memory_size


@dataclass(frozen=True)
class Kernel:
    """Where a kernel goes. ``header`` is its setup header from HEADER_START on, as far as it has
    one."""

    segments: tuple[Segment, ...]
    entry: int
    header: bytes

    @property
    def end(self) -> int:
        """The first address it does not need."""
        return max(segment.end for segment in self.segments)


def read_kernel(file: int) -> Kernel:
    """What the opened file is. Reads its heads only. Raises KernelError, OSError."""
    head = os.pread(file, _HEAD_BYTES, 0)
    size = os.fstat(file).st_size
    kernel = _elf(file, head) if head.startswith(ELF_MAGIC) else _bz_image(head, size)
    for segment in kernel.segments:
        if segment.offset + segment.file_size > size or segment.file_size > segment.memory_size:
            raise KernelError("the kernel is cut off; get it again")
        if segment.address < _LOW or segment.end > _TOP:
            raise KernelError(
                f"the kernel wants to be at {segment.address:#x}, where a kernel can't be; give a "
                "vmlinux or bzImage for x86-64"
            )
    return kernel


def _elf(file: int, head: bytes) -> Kernel:
    """System V ABI, chapters 4 and 5."""
    if len(head) < 64 or head[4:6] != b"\x02\x01":
        raise KernelError("the kernel is no 64-bit little-endian ELF file")
    machine, _, entry, table = struct.unpack_from("<HIQQ", head, 18)
    size, count = struct.unpack_from("<HH", head, 54)
    if machine != _EM_X86_64:
        raise KernelError("the kernel is for another kind of processor than x86-64")
    if size != 56 or not 0 < count <= _MAX_SEGMENTS or table > 1 << 62:
        raise KernelError(f"the kernel has {count} segments of {size} bytes, and none has that")
    headers = os.pread(file, size * count, table)
    if len(headers) < size * count:
        raise KernelError("the kernel's table of segments lies outside the file")
    segments = []
    for kind, _, offset, _, address, file_size, memory_size, _ in struct.iter_unpack(
        "<IIQQQQQQ", headers
    ):
        if kind == _PT_LOAD and memory_size:
            segments.append(Segment(offset, file_size, address, memory_size))
    if not any(segment.address <= entry < segment.end for segment in segments):
        raise KernelError(f"the kernel's entry {entry:#x} lies outside of it")
    return Kernel(tuple(segments), entry, b"")


def _bz_image(head: bytes, size: int) -> Kernel:
    """boot.rst, "The Real-Mode Kernel Header"; the names in the comments are from there."""
    if len(head) < 0x280 or head[0x202:0x206] != b"HdrS":
        raise KernelError("the kernel is neither an ELF vmlinux nor a bzImage; give one of these")
    (protocol,) = struct.unpack_from("<H", head, 0x206)
    (flags,) = struct.unpack_from("<H", head, 0x236)  # xloadflags
    if protocol < _PROTOCOL or not flags & _64_BIT:
        raise KernelError(
            f"the kernel has no 64-bit entry (boot protocol {protocol:#x}); give a newer one"
        )
    (address,) = struct.unpack_from("<Q", head, 0x258)  # pref_address
    (needs,) = struct.unpack_from("<I", head, 0x260)  # init_size
    start = ((head[HEADER_START] or 4) + 1) * 512  # setup_sects
    file_size = size - start
    if file_size <= 0x200:
        raise KernelError("the kernel is cut off; get it again")
    segment = Segment(start, file_size, address, max(needs, file_size))
    header = head[HEADER_START : min(0x202 + head[0x201], HEADER_START + HEADER_ROOM)]
    return Kernel((segment,), address + 0x200, header)
