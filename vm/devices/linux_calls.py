"""System calls that Python's ``os`` lacks or dresses up: by the C library, errors as OSError.

Each is documented in its manual page of section 2.
"""

from __future__ import annotations

import ctypes
import os

RENAME_NOREPLACE = 1
"""Fail with EEXIST rather than replace (rename(2))."""
RENAME_EXCHANGE = 2
"""Swap the two names (rename(2))."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
]
_libc.getdents64.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
_libc.getdents64.restype = ctypes.c_ssize_t
_libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.fstatfs64.argtypes = [ctypes.c_int, ctypes.c_char_p]
for _call in (_libc.setfsuid, _libc.setfsgid):
    _call.argtypes = [ctypes.c_uint32]
    _call.restype = ctypes.c_uint32

_STATFS_BYTES = 256
"""Room for a ``struct statfs64``, which has 120 bytes on 64-bit Linux."""

_NOBODY_AT_ALL = 0xFFFFFFFF
"""The id that is none: setfsuid(2) refuses it, and so only tells the present one."""


def _raise_errno(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, f"{what}: {os.strerror(number)}")


def rename(
    source_directory: int,
    source: bytes,
    target_directory: int,
    target: bytes,
    flags: int,
) -> None:
    """renameat2(2): both names relative to open directories."""
    if _libc.renameat2(source_directory, source, target_directory, target, flags):
        _raise_errno("renameat2")


def read_entries(directory: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    """getdents64(2): fill ``buffer`` with ``linux_dirent64`` records from where the directory
    stands. Returns the bytes filled, 0 at its end."""
    filled = int(_libc.getdents64(directory, buffer, len(buffer)))
    if filled < 0:
        _raise_errno("getdents64")
    return filled


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2). Unlike posix_fallocate(3) it never writes zeros itself where the file system
    can't, which for a large length would take as long as the guest likes."""
    if _libc.fallocate64(descriptor, mode, offset, length):
        _raise_errno("fallocate")


def file_system_magic(descriptor: int) -> int:
    """fstatfs(2): the number of the kind of file system an open file is on, ``f_type``."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs64(descriptor, buffer):
        _raise_errno("fstatfs")
    # Its first field, a long (asm-generic/statfs.h); the numbers have 32 bits.
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def set_file_system_ids(uid: int, gid: int) -> bool:
    """setfsuid(2), setfsgid(2): whom this thread is for files, and this thread only. Leaving uid
    0 drops the capabilities to override file permissions; coming back restores them. The two
    calls report no errors; returns whether the ids are now those."""
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    now = int(_libc.setfsuid(_NOBODY_AT_ALL)), int(_libc.setfsgid(_NOBODY_AT_ALL))
    return now == (uid, gid)
