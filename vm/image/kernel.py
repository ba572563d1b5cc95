"""The kernel as machines load it: the uncompressed ELF file inside a distribution's vmlinuz.

The layout is that of the kernel's `Documentation/arch/x86/boot.rst`.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import Protocol

from voidbus.vm.image.elf import MAGIC, Elf, ElfError
from voidbus.vm.image.fault import ImageError

MAX_KERNEL_BYTES = 512 << 20
"""More than any kernel has, uncompressed; where decompression stops."""

BOOT_MAGIC = (0x202, b"HdrS")
"""Where a bzImage has its signature, and what it is."""

_SECTOR = 512
_PAYLOAD_PROTOCOL = 0x208
"""The boot protocol that brought `payload_offset`, 2.08."""

# Each chunk of the legacy format holds this much, but for the last (lz4's `lz4_Frame_format.md`).
_LZ4_LEGACY_CHUNK = 8 << 20


def extract_vmlinux(image: bytes, name: str = "the kernel") -> bytes:
    """The ELF kernel in a bzImage; what is an ELF file already comes back as it is.

    Raises ImageError where it is neither, damaged, or compressed in a way not known here.
    """
    if image.startswith(MAGIC):
        return _checked(image, name)
    at, signature = BOOT_MAGIC
    if image[at : at + 4] != signature or len(image) < 0x250:
        raise ImageError(f"{name} is no Linux kernel for x86 (no boot header)")
    (protocol,) = struct.unpack_from("<H", image, 0x206)
    if protocol < _PAYLOAD_PROTOCOL:
        raise ImageError(f"{name} speaks boot protocol {protocol:#x}; a newer kernel is needed")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * _SECTOR + offset
    payload = image[start : start + length]
    if len(payload) != length or length < 16:
        raise ImageError(f"{name} is cut off; run `voidbus image build` to fetch it again")
    return _checked(_decompress(payload, name), name)


def _checked(vmlinux: bytes, name: str) -> bytes:
    try:
        Elf(vmlinux).loaded_bytes()
    except ElfError as error:
        raise ImageError(f"{name}: what was unpacked is no kernel: {error}") from error
    return vmlinux


def _decompress(payload: bytes, name: str) -> bytes:
    try:
        if payload.startswith(b"\x02\x21\x4c\x18"):
            return _lz4_legacy(payload)
        decompressor = _decompressor(payload)
        if decompressor is not None:
            vmlinux = decompressor.decompress(payload, MAX_KERNEL_BYTES)
            if not decompressor.eof:
                raise ValueError("it is cut off")
            return vmlinux
    except (ValueError, RuntimeError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ImageError(f"{name} can't be decompressed: {error}; it is damaged") from error
    raise ImageError(
        f"{name} is compressed in a way not known here (it begins with {payload[:4].hex()}); give "
        "one compressed with lz4, gzip, xz, lzma or bzip2, or an uncompressed vmlinux"
    )


class _Decompressor(Protocol):
    """What the standard library's decompressors have in common."""

    @property
    def eof(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _decompressor(payload: bytes) -> _Decompressor | None:
    if payload.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(16 + zlib.MAX_WBITS)
    if payload.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return lzma.LZMADecompressor()
    if payload.startswith(b"BZh"):
        return bz2.BZ2Decompressor()
    return None


def _lz4_legacy(payload: bytes) -> bytes:
    """Chunks of `[u32 LE size][block]` after the magic number; the kernel's build puts the
    uncompressed size, u32 LE, behind them. Raises ValueError where it doesn't fit."""
    from lz4.block import LZ4BlockError, decompress  # type: ignore[import-untyped]

    expected = struct.unpack_from("<I", payload, len(payload) - 4)[0]
    if expected > MAX_KERNEL_BYTES:
        raise ValueError(f"{expected} bytes is no size of a kernel")
    end = len(payload) - 4
    parts = []
    at = 4
    while at + 4 <= end:
        (size,) = struct.unpack_from("<I", payload, at)
        at += 4
        if at + size > end:
            raise ValueError("a chunk reaches over the end")
        try:
            parts.append(decompress(payload[at : at + size], uncompressed_size=_LZ4_LEGACY_CHUNK))
        except LZ4BlockError as error:
            raise ValueError(str(error)) from error
        at += size
    vmlinux = b"".join(parts)
    if len(vmlinux) != expected:
        raise ValueError(f"{len(vmlinux)} bytes instead of {expected}")
    return vmlinux
