"""The FUSE protocol's messages: what a guest kernel asks and how it is answered.

Structures, numbers and names are those of the Linux header ``include/uapi/linux/fuse.h``, protocol
7.31 and later; all little-endian here, as virtio has it (virtio 1.2, 5.11.6). Reading is strict:
what is too short or not terminated is refused with EINVAL, never guessed.
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import Callable
from typing import NamedTuple, TypeVar

MAJOR = 7
"""The protocol's major version (FUSE_KERNEL_VERSION)."""
MINOR = 31
"""The minor version answered, and the lowest taken: Linux 5.4, the first with virtio-fs."""
ROOT_NODE = 1
"""The node id of the share's own directory (FUSE_ROOT_ID)."""
PAGE = 4096
"""The guest's page size, in which max_pages counts."""


class Opcode(enum.IntEnum):
    """enum fuse_opcode: those that are answered otherwise than with ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47


WITHOUT_REPLY = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests that are never answered. (An INTERRUPT would be only to have it sent again.)"""


class InitFlag(enum.IntFlag):
    """What both sides agree on at INIT (FUSE_...): those that are used here."""

    ASYNC_READ = 1 << 0
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22


class SetAttrFlag(enum.IntFlag):
    """Which fields of a SETATTR count (FATTR_...)."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


GETATTR_FH = 1
"""FUSE_GETATTR_FH: the request's handle counts."""
FSYNC_DATA_ONLY = 1
"""FUSE_FSYNC_FDATASYNC."""


# -- requests ---------------------------------------------------------------------------------


_Request = TypeVar("_Request")
_LAYOUTS: dict[object, struct.Struct] = {}


def _laid_out(layout: str) -> Callable[[type[_Request]], type[_Request]]:
    """How a structure's fields lie in memory: as struct has it, without those not read."""

    def remember(kind: type[_Request]) -> type[_Request]:
        _LAYOUTS[kind] = struct.Struct(layout)
        return kind

    return remember


def size_of(kind: object) -> int:
    """The bytes of a structure in memory."""
    return _LAYOUTS[kind].size


@_laid_out("<IIQQ16x")
class InHeader(NamedTuple):
    """struct fuse_in_header. ``length`` is that of the whole request; of the caller's uid, gid and
    pid nothing is believed, so they are not read."""

    length: int
    opcode: int
    unique: int
    node: int


@_laid_out("<IIII")
class InitIn(NamedTuple):
    """struct fuse_init_in, the fields of every version."""

    major: int
    minor: int
    max_readahead: int
    flags: int


@_laid_out("<I4xQ")
class GetAttrIn(NamedTuple):
    """struct fuse_getattr_in."""

    flags: int
    handle: int


@_laid_out("<I4xQQ8xqq8xII4xI4xII4x")
class SetAttrIn(NamedTuple):
    """struct fuse_setattr_in. Times are seconds, which may be negative, and nanoseconds."""

    valid: int
    handle: int
    size: int
    atime: int
    mtime: int
    atime_ns: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int


@_laid_out("<II8x")
class MknodIn(NamedTuple):
    """struct fuse_mknod_in; the name follows. The guest has applied its umask to the mode."""

    mode: int
    device: int


@_laid_out("<I4x")
class MkdirIn(NamedTuple):
    """struct fuse_mkdir_in; the name follows."""

    mode: int


@_laid_out("<Q")
class RenameIn(NamedTuple):
    """struct fuse_rename_in; the old and the new name follow."""

    directory: int


@_laid_out("<QI4x")
class Rename2In(NamedTuple):
    """struct fuse_rename2_in; the old and the new name follow."""

    directory: int
    flags: int


@_laid_out("<Q")
class LinkIn(NamedTuple):
    """struct fuse_link_in; the new name follows."""

    node: int


@_laid_out("<I4x")
class OpenIn(NamedTuple):
    """struct fuse_open_in. ``flags`` are those of open(2)."""

    flags: int


@_laid_out("<II8x")
class CreateIn(NamedTuple):
    """struct fuse_create_in; the name follows."""

    flags: int
    mode: int


@_laid_out("<Q")
class HandleIn(NamedTuple):
    """The handle that begins struct fuse_release_in and others."""

    handle: int


@_laid_out("<QQI20x")
class ReadIn(NamedTuple):
    """struct fuse_read_in, of READ, READDIR and READDIRPLUS."""

    handle: int
    offset: int
    size: int


@_laid_out("<QQI20x")
class WriteIn(NamedTuple):
    """struct fuse_write_in; the data follow."""

    handle: int
    offset: int
    size: int


@_laid_out("<QI4x")
class FsyncIn(NamedTuple):
    """struct fuse_fsync_in."""

    handle: int
    flags: int


@_laid_out("<I4x")
class AccessIn(NamedTuple):
    """struct fuse_access_in. ``mask`` is that of access(2)."""

    mask: int


@_laid_out("<Q")
class ForgetIn(NamedTuple):
    """struct fuse_forget_in."""

    lookups: int


@_laid_out("<QQ")
class ForgetOne(NamedTuple):
    """struct fuse_forget_one: one of a BATCH_FORGET."""

    node: int
    lookups: int


@_laid_out("<I4x")
class BatchForgetIn(NamedTuple):
    """struct fuse_batch_forget_in; so many ForgetOne follow."""

    entries: int


@_laid_out("<QQQI4x")
class FallocateIn(NamedTuple):
    """struct fuse_fallocate_in."""

    handle: int
    offset: int
    length: int
    mode: int


@_laid_out("<QQI4x")
class LseekIn(NamedTuple):
    """struct fuse_lseek_in."""

    handle: int
    offset: int
    whence: int


@_laid_out("<QQQQQQ8x")
class CopyFileRangeIn(NamedTuple):
    """struct fuse_copy_file_range_in."""

    source: int
    source_offset: int
    target_node: int
    target: int
    target_offset: int
    length: int


def parse(kind: Callable[..., _Request], body: bytes) -> _Request:
    """The structure that ``body`` begins with. OSError (EINVAL) if it is cut short."""
    layout = _LAYOUTS[kind]
    if len(body) < layout.size:
        raise OSError(errno.EINVAL, f"a {kind.__name__} cut short")
    return kind(*layout.unpack_from(body))


def parse_forgets(body: bytes) -> list[ForgetOne]:
    """The body of a BATCH_FORGET. OSError (EINVAL) if it has fewer than it says."""
    start = size_of(BatchForgetIn)
    end = start + parse(BatchForgetIn, body).entries * size_of(ForgetOne)
    if len(body) < end:
        raise OSError(errno.EINVAL, "a BATCH_FORGET cut short")
    return [ForgetOne(*fields) for fields in _LAYOUTS[ForgetOne].iter_unpack(body[start:end])]


def parse_strings(body: bytes, kind: object, count: int) -> list[bytes]:
    """The ``count`` strings, each ended by NUL, that follow a structure (with None, begin the
    body). OSError (EINVAL) unless they are there and nothing else is."""
    parts = body[size_of(kind) if kind is not None else 0 :].split(b"\0")
    if len(parts) != count + 1 or parts[-1]:
        raise OSError(errno.EINVAL, "names that are not as many as they must be")
    return parts[:-1]


# -- replies ----------------------------------------------------------------------------------

OUT_HEADER = struct.Struct("<IiQ")
"""struct fuse_out_header: length of the whole, negative errno, the request's unique."""
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
"""struct fuse_init_out."""
OPEN_OUT = struct.Struct("<QI4x")
"""struct fuse_open_out."""
WRITE_OUT = struct.Struct("<I4x")
"""struct fuse_write_out."""
LSEEK_OUT = struct.Struct("<Q")
"""struct fuse_lseek_out."""
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ATTR_OUT = struct.Struct("<QI4x")
_ENTRY_OUT = struct.Struct("<QQQQII")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")
_DIRENT = struct.Struct("<QQII")

ENTRY_BYTES = _ENTRY_OUT.size + _ATTR.size
"""Size of struct fuse_entry_out with its attributes."""

_MAX_U64 = 0xFFFFFFFFFFFFFFFF


class Attributes(NamedTuple):
    """What a guest is told of a file. Times are nanoseconds; ``mode`` includes the type."""

    inode: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    mode: int
    links: int
    uid: int
    gid: int
    block_size: int


def pack_attributes(of: Attributes) -> bytes:
    """struct fuse_attr. No file has a device number: what is a device on the host is none here."""
    times = [divmod(nanoseconds, 1_000_000_000) for nanoseconds in (of.atime, of.mtime, of.ctime)]
    return _ATTR.pack(
        of.inode & _MAX_U64,
        of.size,
        of.blocks,
        *(seconds & _MAX_U64 for seconds, _ in times),
        *(part for _, part in times),
        of.mode,
        min(of.links, 0xFFFFFFFF),
        of.uid,
        of.gid,
        0,
        of.block_size,
        0,
    )


def pack_attr_out(of: Attributes, valid_seconds: int) -> bytes:
    """struct fuse_attr_out: attributes, and how long the guest may believe them."""
    return _ATTR_OUT.pack(valid_seconds, 0) + pack_attributes(of)


def pack_entry_out(node: int, of: Attributes, valid_seconds: int) -> bytes:
    """struct fuse_entry_out. Node ids are never given twice, so the generation is 0."""
    head = _ENTRY_OUT.pack(node, 0, valid_seconds, valid_seconds, 0, 0)
    return head + pack_attributes(of)


NO_ENTRY = bytes(ENTRY_BYTES)
"""A struct fuse_entry_out that tells nothing, for a name in READDIRPLUS that is not looked up."""


def pack_statfs(of: os.statvfs_result) -> bytes:
    """struct fuse_statfs_out."""
    return _STATFS_OUT.pack(
        of.f_blocks,
        of.f_bfree,
        of.f_bavail,
        of.f_files,
        of.f_ffree,
        of.f_bsize,
        of.f_namemax,
        of.f_frsize,
        0,
    )


def pack_dirent(inode: int, offset: int, kind: int, name: bytes) -> bytes:
    """struct fuse_dirent, padded to 8 bytes. ``offset`` is where the entry after it begins;
    ``kind`` a DT_ number of readdir(3)."""
    head = _DIRENT.pack(inode & _MAX_U64, offset & _MAX_U64, len(name), kind)
    return head + name + bytes(-(len(head) + len(name)) % 8)


def dirent_size(name: bytes) -> int:
    """How long ``pack_dirent`` makes this name."""
    return (_DIRENT.size + len(name) + 7) & ~7
