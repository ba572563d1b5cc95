"""Answers a guest kernel's FUSE requests from a shared directory.

A request that makes no sense is answered with an error; only one without a readable header ends
the device. Data go straight between the file and guest memory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from voidbus.vm.devices import fuse_messages as fuse
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.fuse_messages import InitFlag, Opcode, parse, parse_strings
from voidbus.vm.devices.shared_directory import Entry, SharedDirectory
from voidbus.vm.devices.virtqueue import Chain

VALID_SECONDS = 1
"""How long a guest may believe names and attributes before it asks again: how late it sees what
the host changes. That a name is missing it never believes."""

MAX_WRITE = 1 << 20
"""The most bytes in one WRITE, and in one READ: the kernel's own limit of 256 pages."""

BODY_BYTES = 1 << 17
"""The longest request but for the data of a WRITE: a BATCH_FORGET is the longest."""

LISTING_BYTES = 1 << 16
"""The most of a directory in one answer."""

FLAGS = (
    InitFlag.ASYNC_READ
    | InitFlag.ATOMIC_O_TRUNC
    | InitFlag.BIG_WRITES
    | InitFlag.AUTO_INVAL_DATA
    | InitFlag.DO_READDIRPLUS
    | InitFlag.READDIRPLUS_AUTO
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
)
"""What is taken of what the guest offers. No writeback cache: what a guest has written is on the
host when its write returns. No remote locks: they hold inside the guest only."""

_BACKGROUND = 64
_CONGESTION = 48
_WRITE_HEAD = fuse.size_of(fuse.InHeader) + fuse.size_of(fuse.WriteIn)


class _Request(NamedTuple):
    node: int
    body: bytes
    chain: Chain
    room: int
    """Bytes an answer may have after its header."""


class FuseServer:
    """One session at a time with one guest kernel. Not for several threads."""

    def __init__(self, share: SharedDirectory) -> None:
        self._share = share
        self._files = share.files
        self._begun = False
        self._handlers: dict[int, Callable[[_Request], bytes | int]] = {
            Opcode.INIT: self._init,
            Opcode.DESTROY: self._destroy,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._get_attributes,
            Opcode.SETATTR: self._set_attributes,
            Opcode.READLINK: self._read_link,
            Opcode.SYMLINK: self._make_link,
            Opcode.MKNOD: self._make_node,
            Opcode.MKDIR: self._make_directory,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._remove_directory,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.STATFS: self._statistics,
            Opcode.RELEASE: self._release,
            Opcode.FSYNC: self._sync,
            Opcode.FSYNCDIR: self._sync,
            Opcode.OPENDIR: self._open_directory,
            Opcode.READDIR: self._list,
            Opcode.READDIRPLUS: self._list_with_entries,
            Opcode.RELEASEDIR: self._release,
            Opcode.ACCESS: self._access,
            Opcode.LSEEK: self._seek,
            Opcode.FALLOCATE: self._allocate,
            Opcode.COPY_FILE_RANGE: self._copy,
        }

    def reset(self) -> None:
        """Forget the session."""
        self._begun = False
        self._share.reset()

    def serve(self, chain: Chain) -> int:
        """Carry out one request and write its answer. Returns the bytes written; 0 for a request
        that has no answer. DeviceError if there is no header or no room for one."""
        head = fuse.size_of(fuse.InHeader)
        if chain.readable_bytes < head:
            raise DeviceError(f"a FUSE request of {chain.readable_bytes} bytes, less than a header")
        header = parse(fuse.InHeader, chain.read(head))
        if header.opcode in fuse.WITHOUT_REPLY:
            self._take_note(header, chain)
            return 0
        room = chain.writable_bytes - fuse.OUT_HEADER.size
        if room < 0:
            raise DeviceError(f"a FUSE request with {chain.writable_bytes} bytes for its answer")
        failure = 0
        written = 0
        try:
            written = self._answer(header, chain, room)
        except OSError as error:
            failure = error.errno or errno.EIO
        except (OverflowError, ValueError):
            failure = errno.EINVAL  # a number or string Python does not pass to the system call
        length = fuse.OUT_HEADER.size + written
        chain.write(fuse.OUT_HEADER.pack(length, -failure, header.unique))
        return length

    def _answer(self, header: fuse.InHeader, chain: Chain, room: int) -> int:
        handler = self._handlers.get(header.opcode)
        if handler is None:
            # Also FLUSH and SYNCFS (there is nothing to flush), locks (local then), extended
            # attributes, ioctl, poll: the kernel does not ask again.
            raise OSError(errno.ENOSYS, f"operation {header.opcode}")
        if not self._begun and header.opcode != Opcode.INIT:
            raise OSError(errno.EIO, "no session yet")
        body = self._body(header, chain)
        with self._share.acting():
            answer = handler(_Request(header.node, body, chain, room))
        if isinstance(answer, int):
            return answer
        if len(answer) > room:
            raise OSError(errno.EINVAL, "no room for the answer")
        return chain.write(answer, fuse.OUT_HEADER.size)

    def _body(self, header: fuse.InHeader, chain: Chain) -> bytes:
        if header.length != chain.readable_bytes:
            raise OSError(errno.EINVAL, "a request whose length is another")
        head = fuse.size_of(fuse.InHeader)
        if header.opcode == Opcode.WRITE:
            return chain.read(fuse.size_of(fuse.WriteIn), head)
        if header.length > BODY_BYTES:
            raise OSError(errno.EINVAL, "a request too long")
        return chain.read(-1, head)

    def _take_note(self, header: fuse.InHeader, chain: Chain) -> None:
        """What has no answer can't be refused either: what makes no sense is dropped."""
        try:
            body = self._body(header, chain)
            if header.opcode == Opcode.FORGET:
                self._share.forget(header.node, parse(fuse.ForgetIn, body).lookups)
            elif header.opcode == Opcode.BATCH_FORGET:
                for one in fuse.parse_forgets(body):
                    self._share.forget(one.node, one.lookups)
        except OSError:
            return

    # -- the session ----------------------------------------------------------------------

    def _init(self, request: _Request) -> bytes:
        asked = parse(fuse.InitIn, request.body)
        if asked.major < fuse.MAJOR or (asked.major == fuse.MAJOR and asked.minor < fuse.MINOR):
            raise OSError(errno.EPROTO, f"FUSE protocol {asked.major}.{asked.minor} is too old")
        self.reset()
        # A newer major version asks again with ours.
        self._begun = asked.major == fuse.MAJOR
        return fuse.INIT_OUT.pack(
            fuse.MAJOR,
            fuse.MINOR,
            min(asked.max_readahead, MAX_WRITE),
            asked.flags & FLAGS,
            _BACKGROUND,
            _CONGESTION,
            MAX_WRITE,
            1,  # times to the nanosecond
            MAX_WRITE // fuse.PAGE,
            0,
            0,
        )

    def _destroy(self, request: _Request) -> bytes:
        self.reset()
        return b""

    def _statistics(self, request: _Request) -> bytes:
        return fuse.pack_statfs(self._share.statistics())

    # -- names and attributes -------------------------------------------------------------

    def _lookup(self, request: _Request) -> bytes:
        (name,) = parse_strings(request.body, None, 1)
        return self._entry(self._share.lookup(request.node, name))

    def _entry(self, entry: Entry) -> bytes:
        return fuse.pack_entry_out(entry.node, entry.attributes, VALID_SECONDS)

    def _get_attributes(self, request: _Request) -> bytes:
        return fuse.pack_attr_out(self._share.attributes(request.node), VALID_SECONDS)

    def _set_attributes(self, request: _Request) -> bytes:
        change = parse(fuse.SetAttrIn, request.body)
        return fuse.pack_attr_out(
            self._share.change_attributes(request.node, change), VALID_SECONDS
        )

    def _access(self, request: _Request) -> bytes:
        self._share.access(request.node, parse(fuse.AccessIn, request.body).mask)
        return b""

    def _read_link(self, request: _Request) -> bytes:
        return self._share.read_link(request.node)

    def _make_link(self, request: _Request) -> bytes:
        name, target = parse_strings(request.body, None, 2)
        return self._entry(self._share.make_link(request.node, name, target))

    def _make_node(self, request: _Request) -> bytes:
        asked = parse(fuse.MknodIn, request.body)
        (name,) = parse_strings(request.body, fuse.MknodIn, 1)
        return self._entry(self._share.make_node(request.node, name, asked.mode))

    def _make_directory(self, request: _Request) -> bytes:
        asked = parse(fuse.MkdirIn, request.body)
        (name,) = parse_strings(request.body, fuse.MkdirIn, 1)
        return self._entry(self._share.make_directory(request.node, name, asked.mode))

    def _unlink(self, request: _Request) -> bytes:
        (name,) = parse_strings(request.body, None, 1)
        self._share.remove(request.node, name, directory=False)
        return b""

    def _remove_directory(self, request: _Request) -> bytes:
        (name,) = parse_strings(request.body, None, 1)
        self._share.remove(request.node, name, directory=True)
        return b""

    def _rename(self, request: _Request) -> bytes:
        directory = parse(fuse.RenameIn, request.body).directory
        old, new = parse_strings(request.body, fuse.RenameIn, 2)
        self._share.rename(request.node, old, directory, new)
        return b""

    def _rename2(self, request: _Request) -> bytes:
        asked = parse(fuse.Rename2In, request.body)
        old, new = parse_strings(request.body, fuse.Rename2In, 2)
        self._share.rename(request.node, old, asked.directory, new, asked.flags)
        return b""

    def _link(self, request: _Request) -> bytes:
        node = parse(fuse.LinkIn, request.body).node
        (name,) = parse_strings(request.body, fuse.LinkIn, 1)
        return self._entry(self._share.link(node, request.node, name))

    # -- open files -----------------------------------------------------------------------

    def _open(self, request: _Request) -> bytes:
        flags = parse(fuse.OpenIn, request.body).flags
        return fuse.OPEN_OUT.pack(self._share.open_file(request.node, flags), 0)

    def _create(self, request: _Request) -> bytes:
        asked = parse(fuse.CreateIn, request.body)
        (name,) = parse_strings(request.body, fuse.CreateIn, 1)
        entry, handle = self._share.create(request.node, name, asked.flags, asked.mode)
        return self._entry(entry) + fuse.OPEN_OUT.pack(handle, 0)

    def _read(self, request: _Request) -> int:
        asked = parse(fuse.ReadIn, request.body)
        if asked.size > min(request.room, MAX_WRITE):
            raise OSError(errno.EINVAL, "no room for what is to be read")
        into = request.chain.writable_from(fuse.OUT_HEADER.size, asked.size)
        return self._files.read(asked.handle, request.node, asked.offset, into)

    def _write(self, request: _Request) -> bytes:
        asked = parse(fuse.WriteIn, request.body)
        if asked.size > min(request.chain.readable_bytes - _WRITE_HEAD, MAX_WRITE):
            raise OSError(errno.EINVAL, "less data than said, or too much")
        data = request.chain.readable_from(_WRITE_HEAD, asked.size)
        written = self._files.write(asked.handle, request.node, asked.offset, data)
        return fuse.WRITE_OUT.pack(written)

    def _sync(self, request: _Request) -> bytes:
        asked = parse(fuse.FsyncIn, request.body)
        data_only = bool(asked.flags & fuse.FSYNC_DATA_ONLY)
        self._files.sync(asked.handle, request.node, data_only=data_only)
        return b""

    def _release(self, request: _Request) -> bytes:
        self._files.release(parse(fuse.HandleIn, request.body).handle, request.node)
        return b""

    def _seek(self, request: _Request) -> bytes:
        asked = parse(fuse.LseekIn, request.body)
        at = self._files.seek(asked.handle, request.node, asked.offset, asked.whence)
        return fuse.LSEEK_OUT.pack(at)

    def _allocate(self, request: _Request) -> bytes:
        asked = parse(fuse.FallocateIn, request.body)
        self._files.allocate(asked.handle, request.node, asked.mode, asked.offset, asked.length)
        return b""

    def _copy(self, request: _Request) -> bytes:
        asked = parse(fuse.CopyFileRangeIn, request.body)
        copied = self._files.copy(
            (asked.source, request.node),
            asked.source_offset,
            (asked.target, asked.target_node),
            asked.target_offset,
            asked.length,
        )
        return fuse.WRITE_OUT.pack(copied)

    # -- directories ----------------------------------------------------------------------

    def _open_directory(self, request: _Request) -> bytes:
        return fuse.OPEN_OUT.pack(self._share.open_directory(request.node), 0)

    def _list(self, request: _Request) -> bytes:
        asked = parse(fuse.ReadIn, request.body)
        room = min(asked.size, request.room, LISTING_BYTES)
        answer = bytearray()
        for entry in self._share.list_directory(request.node, asked.handle, asked.offset):
            if len(answer) + fuse.dirent_size(entry.name) > room:
                break
            answer += fuse.pack_dirent(entry.inode, entry.offset, entry.kind, entry.name)
        return bytes(answer)

    def _list_with_entries(self, request: _Request) -> bytes:
        asked = parse(fuse.ReadIn, request.body)
        room = min(asked.size, request.room, LISTING_BYTES)
        answer = bytearray()
        for entry in self._share.list_directory(request.node, asked.handle, asked.offset):
            if len(answer) + fuse.ENTRY_BYTES + fuse.dirent_size(entry.name) > room:
                break
            answer += self._looked_up(request.node, entry.name)
            answer += fuse.pack_dirent(entry.inode, entry.offset, entry.kind, entry.name)
        return bytes(answer)

    def _looked_up(self, directory: int, name: bytes) -> bytes:
        # "." and ".." are never looked up; what is gone meanwhile, or does not fit, is told by
        # its name only.
        if name in (os.curdir.encode(), os.pardir.encode()):
            return fuse.NO_ENTRY
        try:
            return self._entry(self._share.lookup(directory, name))
        except OSError:
            return fuse.NO_ENTRY
