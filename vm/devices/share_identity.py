"""Whom a share acts for on the host, and what a guest is told of owners and modes.

A guest has one identity on the host, whatever its processes are inside: the run process's user,
or, when that is root, the owner of the shared directory. Inside, all files are the agent's.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

from voidbus.vm.devices.fuse_messages import Attributes
from voidbus.vm.devices.linux_calls import set_file_system_ids

GUEST_UID = 1000
GUEST_GID = 1000
"""The user an agent runs as inside; the owner of everything in a share, as a guest sees it."""

BLOCK_BYTES = 4096
"""The block size a guest is told, in which its programs like to read and write."""

_PERMISSIONS = 0o777
_KEPT_ON_DIRECTORIES = 0o7000


class ShareIdentity:
    """One identity on the host. Not for several threads."""

    def __init__(self, directory: os.stat_result) -> None:
        """``directory`` is the shared directory. PermissionError if this is root and may not act
        as its owner."""
        self._own = (os.geteuid(), os.getegid())
        self._acting = (directory.st_uid, directory.st_gid) if os.geteuid() == 0 else self._own
        self._groups = frozenset({self._acting[1], *os.getgroups()})
        self._device = directory.st_dev
        self._devices: dict[int, int] = {}
        if self._acting != self._own:
            took = set_file_system_ids(*self._acting)
            set_file_system_ids(*self._own)
            if not took:
                raise PermissionError(f"can't act as uid {directory.st_uid}, its owner")

    @property
    def ids(self) -> tuple[int, int]:
        """The identity: uid and gid."""
        return self._acting

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Do what is done inside, on this thread, as this identity: with its permissions, and what
        is made is its. Root's power over files does not go with it."""
        if self._acting == self._own:
            yield
            return
        if not set_file_system_ids(*self._acting):
            set_file_system_ids(*self._own)
            raise PermissionError("this process may no longer act as the directory's owner")
        try:
            yield
        finally:
            set_file_system_ids(*self._own)

    def attributes(self, found: os.stat_result) -> Attributes:
        """What a guest is told of a file. Its kernel checks permissions by these: as the owner, it
        is shown the rights this identity has. The host checks again, and has the last word.

        Set-uid, set-gid and sticky bits are not shown, nor is any device number.
        """
        uid, _ = self._acting
        mode = found.st_mode
        if uid not in (0, found.st_uid):
            shift = 3 if found.st_gid in self._groups else 0
            mode = mode & ~stat.S_IRWXU | (mode >> shift & 0o7) << 6
        return Attributes(
            inode=self._inode(found),
            size=found.st_size,
            blocks=found.st_blocks,
            atime=found.st_atime_ns,
            mtime=found.st_mtime_ns,
            ctime=found.st_ctime_ns,
            mode=stat.S_IFMT(mode) | mode & _PERMISSIONS,
            links=found.st_nlink,
            uid=GUEST_UID,
            gid=GUEST_GID,
            block_size=BLOCK_BYTES,
        )

    def _inode(self, found: os.stat_result) -> int:
        # Other file systems below the share count their inodes anew; a guest sees one device, on
        # which equal numbers mean one file.
        if found.st_dev == self._device:
            return found.st_ino
        if len(self._devices) < 0xFFFF:
            self._devices.setdefault(found.st_dev, len(self._devices) + 1)
        return found.st_ino ^ self._devices.get(found.st_dev, 0xFFFF) << 48


def creation_mode(asked: int) -> int:
    """The mode of a file a guest makes: permissions only, so that it can't leave a set-uid program
    on the host."""
    return asked & _PERMISSIONS


def changed_mode(asked: int, found: os.stat_result) -> int:
    """The mode of a file when a guest asks for ``asked``. A directory keeps what the host has given
    it beside permissions (set-gid, sticky); a file loses it."""
    kept = found.st_mode & _KEPT_ON_DIRECTORIES if stat.S_ISDIR(found.st_mode) else 0
    return kept | asked & _PERMISSIONS


def strip_privileges(descriptor: int, found: os.stat_result) -> None:
    """Take set-uid and set-gid from a file that is about to be written: a kernel does this for any
    writer but root."""
    if found.st_mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(found.st_mode):
        # Who is not its owner can't, and is a writer for whom the kernel does it.
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, found.st_mode & _PERMISSIONS)
