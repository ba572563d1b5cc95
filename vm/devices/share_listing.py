"""Reading an open directory from any place on, in bounded memory."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from voidbus.vm.devices.linux_calls import read_entries

_BUFFER = 8192
# struct linux_dirent64: d_ino, d_off, d_reclen, d_type; then the name and NUL (getdents64(2)).
_DIRENT = struct.Struct("=QqHB")


class DirectoryEntry(NamedTuple):
    """One name in a directory."""

    inode: int
    offset: int
    """Where the entry after it begins: a cookie of the host's file system."""
    kind: int
    """A DT_ number of readdir(3); 0 is unknown."""
    name: bytes


class Listing:
    """One reading of a directory. Its descriptor stays the caller's."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._at = 0
        # Records as the host gave them: a guest may have thousands of directories open.
        self._records = b""
        self._next = 0

    def entries(self, offset: int) -> Iterator[DirectoryEntry]:
        """The entries from ``offset`` on: 0, or the offset of one that was read. One counts as
        read when the next is asked for. OSError for an offset that can't be."""
        if offset >= 1 << 63:
            raise OSError(errno.EINVAL, "no such place in a directory")
        if offset != self._at:
            self._records, self._next = b"", 0
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            self._at = offset
        while self._next < len(self._records) or self._fill():
            inode, following, length, kind = _DIRENT.unpack_from(self._records, self._next)
            end = self._next + length
            name = self._records[self._next + _DIRENT.size : end].partition(b"\0")[0]
            yield DirectoryEntry(inode, following, kind, name)
            self._next = end
            self._at = following

    def _fill(self) -> bool:
        buffer = ctypes.create_string_buffer(_BUFFER)
        filled = read_entries(self._descriptor, buffer)
        self._records = buffer.raw[:filled]
        self._next = 0
        return bool(self._records)
