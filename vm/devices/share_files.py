"""The open files of one share: reading, writing and listing by handle.

Only regular files and directories are ever opened, by reopening what a node's descriptor holds
(/proc/self/fd), so it is certain what is opened; opening a FIFO or a device could wait for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from voidbus.vm.devices.linux_calls import fallocate
from voidbus.vm.devices.share_identity import strip_privileges
from voidbus.vm.devices.share_listing import Listing
from voidbus.vm.devices.share_nodes import Node, NodeTable

COPY_BYTES = 16 * 1024 * 1024
"""The most one COPY_FILE_RANGE copies, so that it does not keep other requests waiting for long;
the guest asks again for the rest (copy_file_range(2))."""

_LARGEST = (1 << 63) - 1
_IOV_MAX = 1024
"""Pieces in one readv(2) or writev(2)."""

_TAKEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC
"""What of open(2)'s flags is passed on. O_APPEND too: the host then appends, also where somebody
else has appended meanwhile. Not O_DIRECT, whose alignment rules are the host's."""

# fallocate(2): FALLOC_FL_KEEP_SIZE 1, PUNCH_HOLE 2 (with KEEP_SIZE), ZERO_RANGE 16.
_ALLOCATIONS = frozenset({0, 1, 1 | 2, 16, 16 | 1})


class Handle:
    """An open file or directory."""

    __slots__ = ("descriptor", "listing", "node", "readable", "writable")

    def __init__(self, descriptor: int, node: Node, flags: int) -> None:
        access = flags & os.O_ACCMODE
        self.descriptor = descriptor
        self.node = node
        self.readable = access in (os.O_RDONLY, os.O_RDWR)
        self.writable = access in (os.O_WRONLY, os.O_RDWR)
        self.listing = Listing(descriptor) if node.kind == stat.S_IFDIR else None


class OpenFiles:
    """The handles of one share. All calls raise OSError as the system calls they are named after;
    a handle that was never given, or was for another node, is EBADF. Not for several threads."""

    def __init__(self, nodes: NodeTable, limit: int, *, writable: bool) -> None:
        self._nodes = nodes
        self._limit = limit
        self._writable = writable
        self._handles: dict[int, Handle] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._handles)

    # -- opening and closing --------------------------------------------------------------

    def require_room(self) -> None:
        """ENFILE if no handle can be given."""
        if len(self._handles) >= self._limit:
            raise OSError(errno.ENFILE, f"more than {self._limit} open files")

    def open_file(self, node: Node, flags: int) -> int:
        """A handle for a regular file, with the flags of open(2)."""
        self.require_room()
        descriptor = self._reopen(node, flags)
        return self.adopt(node, descriptor, flags)

    def open_directory(self, node: Node) -> int:
        """A handle for a directory."""
        self.require_room()
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        descriptor = os.open(_reopening(self._nodes.descriptor(node)), flags)
        return self.adopt(node, descriptor, os.O_RDONLY)

    def adopt(self, node: Node, descriptor: int, flags: int) -> int:
        """A handle for a descriptor, which is owned from now on."""
        number = self._next
        self._next += 1
        self._handles[number] = Handle(descriptor, node, flags)
        node.open.append(descriptor)
        return number

    def _reopen(self, node: Node, flags: int) -> int:
        if node.kind != stat.S_IFREG:
            refusals = {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}
            raise OSError(refusals.get(node.kind, errno.EPERM), "not a regular file")
        changes = flags & os.O_ACCMODE != os.O_RDONLY
        if not self._writable and (changes or flags & os.O_TRUNC):
            raise OSError(errno.EROFS, "a read-only share")
        if flags & os.O_TRUNC and not changes:
            self.truncate(node, None, 0)  # Linux does so, though POSIX does not say
        descriptor = os.open(_reopening(self._nodes.descriptor(node)), taken_flags(flags))
        try:
            if changes:
                strip_privileges(descriptor, os.fstat(descriptor))
                if flags & os.O_TRUNC:
                    os.ftruncate(descriptor, 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def release(self, number: int, node: int) -> None:
        """Close a handle."""
        self._release(number, self._handle(number, node))

    def _release(self, number: int, handle: Handle) -> None:
        del self._handles[number]
        handle.node.open.remove(handle.descriptor)
        os.close(handle.descriptor)
        self._nodes.settle(handle.node)

    def close(self) -> None:
        """Close all handles. Again is fine."""
        for number, handle in list(self._handles.items()):
            self._release(number, handle)

    def _handle(self, number: int, node: int) -> Handle:
        handle = self._handles.get(number)
        if handle is None or handle.node.number != node:
            raise OSError(errno.EBADF, "no such handle")
        return handle

    def _file(self, number: int, node: int, *, writing: bool = False) -> int:
        handle = self._handle(number, node)
        if handle.listing is not None:
            raise OSError(errno.EISDIR, "a directory")
        if not (handle.writable if writing else handle.readable):
            raise OSError(errno.EBADF, "not opened for this")
        return handle.descriptor

    # -- data -----------------------------------------------------------------------------

    def read(self, number: int, node: int, offset: int, into: Sequence[memoryview]) -> int:
        """Read at ``offset`` into the pieces. Returns the bytes read, fewer at the end."""
        descriptor = self._file(number, node)
        pieces = into[:_IOV_MAX]
        _require_range(offset, sum(map(len, pieces)))
        return os.preadv(descriptor, pieces, offset) if pieces else 0

    def write(self, number: int, node: int, offset: int, data: Sequence[memoryview]) -> int:
        """Write the pieces at ``offset``. Returns the bytes written."""
        descriptor = self._file(number, node, writing=True)
        pieces = data[:_IOV_MAX]
        _require_range(offset, sum(map(len, pieces)))
        return os.pwritev(descriptor, pieces, offset) if pieces else 0

    def truncate(self, node: Node, number: int | None, size: int) -> None:
        """Make a regular file ``size`` bytes long, by a handle if it has one for writing."""
        _require_range(0, size)
        if number is not None:
            os.ftruncate(self._file(number, node.number, writing=True), size)
            return
        descriptor = self._reopen(node, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)

    def allocate(self, number: int, node: int, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        descriptor = self._file(number, node, writing=True)
        if mode not in _ALLOCATIONS:
            raise OSError(errno.EOPNOTSUPP, f"fallocate mode {mode}")
        _require_range(offset, length)
        fallocate(descriptor, mode, offset, length)

    def seek(self, number: int, node: int, offset: int, whence: int) -> int:
        """lseek(2) to data or a hole; other places the guest knows itself."""
        descriptor = self._file(number, node)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, f"whence {whence}")
        _require_range(offset, 0)
        return os.lseek(descriptor, offset, whence)

    def copy(
        self,
        source: tuple[int, int],
        source_offset: int,
        target: tuple[int, int],
        target_offset: int,
        length: int,
    ) -> int:
        """copy_file_range(2) between two files, each a handle and its node; COPY_BYTES at most.
        Returns the bytes copied."""
        reading = self._file(*source)
        writing = self._file(*target, writing=True)
        length = min(length, COPY_BYTES)
        _require_range(source_offset, length)
        _require_range(target_offset, length)
        return os.copy_file_range(reading, writing, length, source_offset, target_offset)

    def sync(self, number: int, node: int, *, data_only: bool) -> None:
        """fsync(2), or fdatasync(2), of a file or a directory."""
        descriptor = self._handle(number, node).descriptor
        if data_only:
            os.fdatasync(descriptor)
        else:
            os.fsync(descriptor)

    def listing(self, number: int, node: int) -> Listing:
        """The reading of an open directory. ENOTDIR for a file."""
        listing = self._handle(number, node).listing
        if listing is None:
            raise OSError(errno.ENOTDIR, "not a directory")
        return listing


def taken_flags(flags: int) -> int:
    """The flags of open(2) to use for those a guest asks for. EINVAL for an access mode that is
    none."""
    if flags & os.O_ACCMODE == os.O_ACCMODE:
        raise OSError(errno.EINVAL, "no access mode")
    return flags & _TAKEN_FLAGS | os.O_CLOEXEC | os.O_NOCTTY


def _reopening(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _require_range(offset: int, length: int) -> None:
    if offset + length > _LARGEST:
        raise OSError(errno.EFBIG, "past the largest file")
