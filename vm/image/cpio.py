"""Archives in the format the kernel unpacks its initramfs from: cpio, "newc" variant.

The format is in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`. The
same entries give the same bytes: they are written sorted by path, with one modification time and
inode numbers counted from 1.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from voidbus.vm.image.fault import ImageError

ALIGNMENT = 512
"""Archives are padded to this, as cpio(1) does. The kernel wants 4 where one follows another."""

MAX_FILE_BYTES = (1 << 32) - 1
"""The size field has eight hexadecimal digits."""

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, directory, symbolic link or device node.

    `path` is relative, without `./` in front; `.` is the root itself. `mode` holds the type too
    (`S_IFREG` and so on). `content` is the bytes, or the file they are in, or a link's target.
    """

    path: str
    mode: int
    content: bytes | Path = b""
    uid: int = 0
    gid: int = 0
    device: tuple[int, int] = (0, 0)


def directory(path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(path, stat.S_IFDIR | mode, uid=uid, gid=gid)


def regular(path: str, content: bytes | Path, mode: int = 0o644) -> Entry:
    return Entry(path, stat.S_IFREG | mode, content)


def symlink(path: str, target: str) -> Entry:
    return Entry(path, stat.S_IFLNK | 0o777, os.fsencode(target))


def character_device(path: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(path, stat.S_IFCHR | mode, device=(major, minor))


def write_archive(entries: Iterable[Entry], stream: BinaryIO) -> int:
    """Writes one archive and returns its length in bytes, a multiple of ALIGNMENT.

    Parents come before what is in them, because a path sorts after its beginnings. Raises
    ImageError for a path that is given twice, absolute or has `..`, and for a file that changes
    its size meanwhile; OSError where files can't be read or written.
    """
    written = 0
    last = ""
    for inode, entry in enumerate(sorted(entries, key=lambda entry: entry.path), 1):
        if entry.path == last or not _is_plain(entry.path):
            raise ImageError(f"an archive can't hold {entry.path!r} (twice, or no plain path)")
        last = entry.path
        written += _write_entry(stream, entry, inode)
    end = _header(_TRAILER, 0, 0, 1, Entry(_TRAILER, 0))
    stream.write(end)
    written += len(end)
    return written + _pad(stream, written, ALIGNMENT)


def _is_plain(path: str) -> bool:
    return path == "." or not any(part in ("", ".", "..") for part in path.split("/"))


def _write_entry(stream: BinaryIO, entry: Entry, inode: int) -> int:
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    if isinstance(entry.content, bytes):
        size = len(entry.content)
        head = _header(entry.path, inode, size, links, entry)
        stream.write(head + entry.content)
    else:
        with entry.content.open("rb") as source:
            size = os.fstat(source.fileno()).st_size
            head = _header(entry.path, inode, size, links, entry)
            stream.write(head)
            if _copy(source, stream) != size:
                raise ImageError(f"{entry.content} changed while it was read; build again")
    length = len(head) + size
    return length + _pad(stream, length, 4)


def _header(path: str, inode: int, size: int, links: int, entry: Entry) -> bytes:
    """Header and name, padded to 4."""
    if size > MAX_FILE_BYTES:
        raise ImageError(f"{path} is larger than an archive's file can be ({MAX_FILE_BYTES} bytes)")
    name = os.fsencode(path) + b"\0"
    mtime = 0
    fields = (
        *(inode, entry.mode, entry.uid, entry.gid, links, mtime, size),
        *(0, 0, *entry.device, len(name), 0),
    )
    head = _MAGIC + b"".join(b"%08X" % value for value in fields) + name
    return head + bytes(-len(head) % 4)


def _copy(source: BinaryIO, stream: BinaryIO) -> int:
    copied = 0
    while block := source.read(_BLOCK):
        stream.write(block)
        copied += len(block)
    return copied


def _pad(stream: BinaryIO, length: int, alignment: int) -> int:
    missing = -length % alignment
    stream.write(bytes(missing))
    return missing
