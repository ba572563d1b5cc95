"""A directory of the host as a guest may use it: names, attributes, and what is open.

Everything works on descriptors and single names, never on paths (share_nodes.py), as one identity
(share_identity.py), within bounds. Calls raise OSError, whose errno is the guest's answer.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from voidbus.vm.devices import linux_calls
from voidbus.vm.devices.fuse_messages import Attributes, SetAttrFlag, SetAttrIn
from voidbus.vm.devices.kernel_file_systems import kernel_file_system
from voidbus.vm.devices.share_files import OpenFiles, taken_flags
from voidbus.vm.devices.share_identity import (
    GUEST_GID,
    GUEST_UID,
    ShareIdentity,
    changed_mode,
    creation_mode,
)
from voidbus.vm.devices.share_listing import DirectoryEntry
from voidbus.vm.devices.share_nodes import Node, NodeTable, ShareLimits

NAME_BYTES = 255
"""The longest name (NAME_MAX)."""
LINK_BYTES = 4095
"""The longest target of a symbolic link (PATH_MAX without its NUL)."""

_CHANGES_OF_TIME = (
    SetAttrFlag.ATIME | SetAttrFlag.MTIME | SetAttrFlag.ATIME_NOW | SetAttrFlag.MTIME_NOW
)


class MountError(Exception):
    """A host directory that can't be shared: which, why, and what to do."""


class Entry(NamedTuple):
    """A file as a guest is told of it. It must be forgotten as often as it was told of."""

    node: int
    attributes: Attributes


class SharedDirectory:
    """One share. Not for several threads."""

    def __init__(
        self, directory: Path, *, writable: bool, limits: ShareLimits | None = None
    ) -> None:
        """Open ``directory`` (a link is followed here, for the last time). MountError."""
        limits = limits or ShareLimits.of_process()
        self._writable = writable
        root = _open_root(directory)
        try:
            kind = kernel_file_system(root)
            if kind is not None:
                raise MountError(
                    f"{directory} can't be shared: it is on {kind}, by which the host's kernel is "
                    "spoken to. Share a directory with files, or copy what is needed of it."
                )
            self._identity = ShareIdentity(os.fstat(root))
        except OSError as error:
            os.close(root)
            raise MountError(
                f"{directory} can't be shared: {error}. Run voidbus as its owner, or with "
                "CAP_SETUID and CAP_SETGID."
            ) from None
        except MountError:
            os.close(root)
            raise
        self._nodes = NodeTable(root, limits)
        with self.acting():
            usable = _may(root, os.R_OK | os.X_OK)
        if not usable:
            self._nodes.close()
            raise _closed_to_us(directory, os.strerror(errno.EACCES))
        self.files = OpenFiles(self._nodes, limits.handles, writable=writable)
        """What is open."""

    @property
    def known(self) -> int:
        """How many files the guest knows, the root aside."""
        return len(self._nodes)

    @property
    def owner(self) -> tuple[int, int]:
        """Whom the share acts as on the host: uid and gid."""
        return self._identity.ids

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Inside, this thread has the share's identity. For every call but ``reset`` and
        ``close``."""
        return self._identity.acting()

    # -- looking --------------------------------------------------------------------------

    def lookup(self, parent: int, name: bytes) -> Entry:
        """The file of that name."""
        directory = self._nodes.get(parent)
        _require_name(name)
        return self._found(directory, name, self._stat_at(directory, name))

    def attributes(self, node: int) -> Attributes:
        """What the host says of the file now."""
        return self._identity.attributes(self._nodes.stat(self._nodes.get(node)))

    def read_link(self, node: int) -> bytes:
        """The target of a symbolic link, for the guest to follow in its own world."""
        link = self._nodes.get(node)
        if link.kind != stat.S_IFLNK:
            raise OSError(errno.EINVAL, "not a symbolic link")
        return os.readlink(b"", dir_fd=self._nodes.descriptor(link))

    def access(self, node: int, mask: int) -> None:
        """EACCES unless the share's identity may: access(2)."""
        file = self._nodes.get(node)
        if mask & os.W_OK and not self._writable:
            raise OSError(errno.EROFS, "a read-only share")
        if not _may(self._nodes.descriptor(file), mask & (os.R_OK | os.W_OK | os.X_OK)):
            raise OSError(errno.EACCES, "the host does not permit it")

    def statistics(self) -> os.statvfs_result:
        """statvfs(3) of the file system the shared directory is on."""
        return os.statvfs(self._nodes.descriptor(self._nodes.root))

    def list_directory(self, node: int, handle: int, offset: int) -> Iterator[DirectoryEntry]:
        """The entries from ``offset`` on. What is above the share is not told of."""
        directory = self._nodes.get(node)
        for entry in self.files.listing(handle, node).entries(offset):
            if entry.name == b".." and directory is self._nodes.root:
                yield entry._replace(inode=directory.place[1])
            else:
                yield entry

    def forget(self, node: int, lookups: int) -> None:
        """The guest has forgotten a file ``lookups`` times. Unknown ones are let be."""
        self._nodes.forget(node, lookups)

    # -- changing -------------------------------------------------------------------------

    def change_attributes(self, node: int, change: SetAttrIn) -> Attributes:
        """Size, mode and times, as ``change.valid`` says. The owner stays what it is: EPERM for
        another."""
        self._require_writable()
        file = self._nodes.get(node)
        valid = change.valid
        if (valid & SetAttrFlag.UID and change.uid != GUEST_UID) or (
            valid & SetAttrFlag.GID and change.gid != GUEST_GID
        ):
            raise OSError(errno.EPERM, "files of a share have one owner")
        if valid & SetAttrFlag.SIZE:
            handle = change.handle if valid & SetAttrFlag.FH else None
            self.files.truncate(file, handle, change.size)
        if valid & SetAttrFlag.MODE:
            descriptor = self._nodes.descriptor(file)
            mode = changed_mode(change.mode, os.fstat(descriptor))
            os.chmod(f"/proc/self/fd/{descriptor}", mode)  # noqa: PTH101 -- a descriptor, no path
        if valid & _CHANGES_OF_TIME:
            self._set_times(file, change)
        return self._identity.attributes(self._nodes.stat(file))

    def _set_times(self, file: Node, change: SetAttrIn) -> None:
        descriptor = self._nodes.descriptor(file)
        path = f"/proc/self/fd/{descriptor}"
        now = SetAttrFlag.ATIME_NOW | SetAttrFlag.MTIME_NOW
        if change.valid & now == now:
            os.utime(path)  # who may write the file may do this, though not its owner
            return
        present = os.fstat(descriptor)
        atime, mtime = present.st_atime_ns, present.st_mtime_ns
        clock = time.time_ns()
        if change.valid & SetAttrFlag.ATIME_NOW:
            atime = clock
        elif change.valid & SetAttrFlag.ATIME:
            atime = _nanoseconds(change.atime, change.atime_ns)
        if change.valid & SetAttrFlag.MTIME_NOW:
            mtime = clock
        elif change.valid & SetAttrFlag.MTIME:
            mtime = _nanoseconds(change.mtime, change.mtime_ns)
        os.utime(path, ns=(atime, mtime))

    def create(self, parent: int, name: bytes, flags: int, mode: int) -> tuple[Entry, int]:
        """Make a regular file and open it, or open the one there is unless O_EXCL is asked for."""
        directory, within = self._to_change(parent, name)
        self.files.require_room()
        try:
            descriptor = self._make_file(within, name, taken_flags(flags), mode)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            return self._open_existing(parent, name, flags)
        try:
            entry = self._found(directory, name, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return entry, self.files.adopt(self._nodes.get(entry.node), descriptor, flags)

    def _open_existing(self, parent: int, name: bytes, flags: int) -> tuple[Entry, int]:
        entry = self.lookup(parent, name)
        try:
            handle = self.files.open_file(self._nodes.get(entry.node), flags)
        except BaseException:
            self.forget(entry.node, 1)
            raise
        return entry, handle

    def _make_file(self, within: int, name: bytes, flags: int, asked: int) -> int:
        mode = creation_mode(asked)
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        descriptor = os.open(name, flags, mode, dir_fd=within)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
                os.fchmod(descriptor, mode)  # our umask is not the guest's
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def make_node(self, parent: int, name: bytes, mode: int) -> Entry:
        """mknod(2), for regular files only. A FIFO could stop a program of the host that opens
        it, and a device would be one of the host: EPERM."""
        directory, within = self._to_change(parent, name)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise OSError(errno.EPERM, "only regular files can be made")
        flags = os.O_WRONLY | os.O_CLOEXEC
        descriptor = self._make_file(within, name, flags, mode)
        try:
            return self._found(directory, name, os.fstat(descriptor))
        finally:
            os.close(descriptor)

    def make_directory(self, parent: int, name: bytes, mode: int) -> Entry:
        """mkdir(2)."""
        directory, within = self._to_change(parent, name)
        os.mkdir(name, creation_mode(mode), dir_fd=within)
        found = self._stat_at(directory, name)
        entry = self._found(directory, name, found)
        wanted = changed_mode(mode, found)
        if stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) != wanted:
            made = self._nodes.get(entry.node)
            descriptor = self._nodes.descriptor(made)
            os.chmod(f"/proc/self/fd/{descriptor}", wanted)  # noqa: PTH101 -- a descriptor, no path
            return entry._replace(attributes=self.attributes(entry.node))
        return entry

    def make_link(self, parent: int, name: bytes, target: bytes) -> Entry:
        """symlink(2). The target is the guest's affair; nothing here ever follows it."""
        directory, within = self._to_change(parent, name)
        if not 0 < len(target) <= LINK_BYTES or b"\0" in target:
            raise OSError(errno.ENAMETOOLONG if target else errno.ENOENT, "no target of a link")
        os.symlink(target, name, dir_fd=within)
        return self._found(directory, name, self._stat_at(directory, name))

    def link(self, node: int, parent: int, name: bytes) -> Entry:
        """link(2): another name for a regular file the guest knows. EPERM for what is none."""
        directory, within = self._to_change(parent, name)
        file = self._nodes.get(node)
        if file.kind != stat.S_IFREG:
            raise OSError(errno.EPERM, "only regular files can have several names")
        # What is followed is the descriptor, to the file it holds, which is no link itself.
        source = f"/proc/self/fd/{self._nodes.descriptor(file)}"
        os.link(source, name, dst_dir_fd=within, follow_symlinks=True)
        return self._found(directory, name, self._stat_at(directory, name))

    def remove(self, parent: int, name: bytes, *, directory: bool) -> None:
        """unlink(2) or rmdir(2)."""
        within_node, within = self._to_change(parent, name)
        found = self._stat_at(within_node, name)
        if directory:
            os.rmdir(name, dir_fd=within)
        else:
            os.unlink(name, dir_fd=within)
        self._lost_name(found)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """renameat2(2), with no flags, RENAME_NOREPLACE or RENAME_EXCHANGE."""
        source, within = self._to_change(parent, name)
        target, new_within = self._to_change(new_parent, new_name)
        if flags not in (0, linux_calls.RENAME_NOREPLACE, linux_calls.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, f"rename flags {flags}")
        moving = self._stat_at(source, name)
        there: os.stat_result | None = None
        with contextlib.suppress(FileNotFoundError):
            there = self._stat_at(target, new_name)
        linux_calls.rename(within, name, new_within, new_name, flags)
        if there is not None and os.path.samestat(moving, there):
            return  # two names of one file: both stay (rename(2))
        if there is not None:
            if flags == linux_calls.RENAME_EXCHANGE:
                self._moved(there, source, name)
            else:
                self._lost_name(there)
        self._moved(moving, target, new_name)

    def _moved(self, what: os.stat_result, directory: Node, name: bytes) -> None:
        if (node := self._nodes.at(what)) is not None:
            self._nodes.moved(node, directory, name)

    def _lost_name(self, what: os.stat_result) -> None:
        if (node := self._nodes.at(what)) is not None:
            last = stat.S_ISDIR(what.st_mode) or what.st_nlink <= 1
            self._nodes.removed(node, last=last)

    def open_file(self, node: int, flags: int) -> int:
        """open(2) of a regular file: its handle."""
        return self.files.open_file(self._nodes.get(node), flags)

    def open_directory(self, node: int) -> int:
        """opendir(3): its handle."""
        return self.files.open_directory(self._nodes.get(node))

    # -- inside ---------------------------------------------------------------------------

    def _require_writable(self) -> None:
        if not self._writable:
            raise OSError(errno.EROFS, "a read-only share")

    def _to_change(self, parent: int, name: bytes) -> tuple[Node, int]:
        """The directory in which a name is to be made, taken or given, and its descriptor."""
        self._require_writable()
        directory = self._nodes.get(parent)
        _require_name(name)
        return directory, self._nodes.descriptor(directory)

    def _stat_at(self, directory: Node, name: bytes) -> os.stat_result:
        return os.stat(name, dir_fd=self._nodes.descriptor(directory), follow_symlinks=False)

    def _found(self, directory: Node, name: bytes, what: os.stat_result) -> Entry:
        if what.st_dev != directory.place[0]:
            self._require_files(directory, name, what)
        node = self._nodes.found(directory, name, what)
        return Entry(node.number, self._identity.attributes(what))

    def _require_files(self, directory: Node, name: bytes, what: os.stat_result) -> None:
        """EACCES where another file system begins that is the kernel's and not of files."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        opened = os.open(name, flags, dir_fd=self._nodes.descriptor(directory))
        try:
            if os.fstat(opened).st_dev != what.st_dev:
                raise OSError(errno.ESTALE, "another file has its name")
            if (kind := kernel_file_system(opened)) is not None:
                raise OSError(errno.EACCES, f"{kind} is not shared")
        finally:
            os.close(opened)

    # -- the end --------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the guest: all handles and nodes."""
        self.files.close()
        self._nodes.clear()

    def close(self) -> None:
        """Close everything. Again is fine."""
        self.files.close()
        self._nodes.close()


def _require_name(name: bytes) -> None:
    """A name is one name: it leads nowhere but to what the directory has under it."""
    if len(name) > NAME_BYTES:
        raise OSError(errno.ENAMETOOLONG, "a name of more than 255 bytes")
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "not a name")


def _nanoseconds(seconds: int, nanoseconds: int) -> int:
    if nanoseconds >= 1_000_000_000 or not -(1 << 33) < seconds < 1 << 34:
        raise OSError(errno.EINVAL, "no time")
    return seconds * 1_000_000_000 + nanoseconds


def _open_root(directory: Path) -> int:
    try:
        return os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MountError(
            f"{directory} can't be shared: there is no such directory. Make it (mkdir -p "
            f"{directory}), or correct the mount's host path."
        ) from None
    except NotADirectoryError:
        raise MountError(
            f"{directory} can't be shared: it is not a directory. Share the directory it is in."
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise _closed_to_us(directory, str(reason)) from None


def _may(descriptor: int, mask: int) -> bool:
    return os.access(f"/proc/self/fd/{descriptor}", mask, effective_ids=True)


def _closed_to_us(directory: Path, reason: str) -> MountError:
    return MountError(
        f"{directory} can't be shared: {reason}. The user who runs voidbus, or where that is root "
        "the directory's owner, must be able to read and enter it."
    )
