"""The user QEMU runs as where root starts it: one that nothing else on the host is.

So whoever gets out of QEMU has no file of anybody's, and can neither signal nor trace the QEMU of
another run. Everything it needs is handed to it as open descriptors.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from voidbus.vm.kvm.system import KVM_DEVICE

FIRST_UID = 0x7000_0000
"""From here on nobody gives user ids away (systemd's UIDS-GIDS.md: beyond containers' ranges)."""

NOBODY = 65534
"""The user of nothing (the kernel's overflow uid), where a container maps no ids that high."""


@dataclass(frozen=True)
class QemuUser:
    """User, group, and the further groups it is in."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


def qemu_user(
    acceleration: str,
    *,
    euid: int | None = None,
    pid: int | None = None,
    device: Path = KVM_DEVICE,
    maps: tuple[Path, Path] = (Path("/proc/self/uid_map"), Path("/proc/self/gid_map")),
) -> QemuUser | None:
    """The user for the machines of this process, ``pid``; None: the one this process has. That is
    so for everybody but root; and for root where it could not be changed without losing what QEMU
    needs: a `/dev/kvm` that is root's alone, or a container that has no other user."""
    if (os.geteuid() if euid is None else euid) != 0:
        return None
    own = FIRST_UID + (os.getpid() if pid is None else pid)
    for number in (own, NOBODY):
        if all(_is_mapped(path, number) for path in maps):
            break
    else:
        return None
    if acceleration != "kvm":
        return QemuUser(number, number)
    try:
        status = device.stat()
    except OSError:
        return None
    if status.st_mode & stat.S_IROTH and status.st_mode & stat.S_IWOTH:
        return QemuUser(number, number)
    if status.st_mode & stat.S_IRGRP and status.st_mode & stat.S_IWGRP and status.st_gid != 0:
        return QemuUser(number, number, (status.st_gid,))
    return None


def _is_mapped(path: Path, number: int) -> bool:
    """Whether this process may give itself an id: it is in its user namespace
    (user_namespaces(7))."""
    try:
        ranges = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return False
    return any(first <= number < first + count for first, _, count in ranges)


def readable(path: Path, user: QemuUser | None) -> int:
    """A descriptor by which ``user`` can open the file anew, as `/proc/self/fd/N`. A file that is
    not everybody's to read is copied into memory. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if user is None or status.st_mode & stat.S_IROTH:
            return fd
        copy = os.memfd_create(path.name[:64], os.MFD_CLOEXEC)
        try:
            _copy(fd, copy, status.st_size)
        except BaseException:
            os.close(copy)
            raise
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return copy


def _copy(source: int, target: int, size: int) -> None:
    while size > 0:
        count = os.sendfile(target, source, None, size)
        if not count:
            raise OSError("the file became shorter while it was read")
        size -= count
