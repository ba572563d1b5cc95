"""inotify(7), which the standard library has no functions for: by the C library and ctypes."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

ATTRIB = 0x4  # <sys/inotify.h>, as all of these
CLOSE_WRITE = 0x8
CLOSE_NOWRITE = 0x10
OPEN = 0x20
MOVED_FROM = 0x40
MOVED_TO = 0x80
CREATE = 0x100
DELETE = 0x200
DELETE_SELF = 0x400
MOVE_SELF = 0x800
UNMOUNT = 0x2000
QUEUE_OVERFLOW = 0x4000
IGNORED = 0x8000
ONLY_DIRECTORY = 0x0100_0000
EXCLUDE_UNLINKED = 0x0400_0000
MASK_ADD = 0x2000_0000

_EVENT = struct.Struct("=iIII")
_READ = 64 * 1024
_libc = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """What happened: at which watch, and to which name in its directory ("" to itself)."""

    watch: int
    mask: int
    name: str


class Inotify:
    """One inotify instance. Its descriptor can be polled for reading. Raises OSError when there
    can be none."""

    def __init__(self) -> None:
        self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK), "inotify")

    def fileno(self) -> int:
        return self._fd

    def add(self, directory: int, mask: int) -> int:
        """Watch an opened directory, not what has its path now. The number of the watch, which
        an inode has only one of. Raises OSError."""
        path = f"/proc/self/fd/{directory}".encode()
        return _checked(_libc.inotify_add_watch(self._fd, path, ctypes.c_uint32(mask)), "inotify")

    def remove(self, watch: int) -> None:
        """End a watch; one that has ended by itself is no error."""
        _libc.inotify_rm_watch(self._fd, watch)

    def read(self) -> list[Event] | None:
        """Some of the events that wait; None when there are none."""
        try:
            return list(_events(os.read(self._fd, _READ)))
        except BlockingIOError:
            return None

    def close(self) -> None:
        os.close(self._fd)


def _events(data: bytes) -> Iterator[Event]:
    position = 0
    while position < len(data):
        watch, mask, _, length = _EVENT.unpack_from(data, position)
        position += _EVENT.size
        name = data[position : position + length].rstrip(b"\0")
        position += length
        yield Event(watch, mask, os.fsdecode(name))


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result
