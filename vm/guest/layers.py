"""The machine's root: the initramfs, or an overlay of it with layers, or an image's own.

The initramfs can't be left by pivot_root(2) (kernel documentation,
filesystems/ramfs-rootfs-initramfs). So the new root is made below ``/run/voidbus``, what is
mounted already is moved into it, and it is moved onto ``/`` itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from . import kernel
from .block_device import read_start
from .boot_line import BootLine, Share
from .modules import Modules
from .mounts import mount_at, place

PRIVATE = "/run/voidbus"
"""Where the parts of the root are mounted before it is. Out of reach afterwards."""

BASE = "/opt/voidbus"
"""Where an image's root has the initramfs, read-only."""

_PLAIN = kernel.MS_RDONLY | kernel.MS_NODEV | kernel.MS_NOSUID
_MOVED = ("/proc", "/sys", "/dev", "/tmp")  # noqa: S108 - mount points
_HEAD_BYTES = 2048


class RootError(Exception):
    """The root the host asked for can't be had: which part, and why."""


def file_system_of(head: bytes) -> str | None:
    """The type of a file system by the magic number in its first 2048 bytes: squashfs, erofs,
    ext4, or None (magic numbers: <linux/magic.h>, the ext4 one at byte 56 of its superblock)."""
    if head[:4] == b"hsqs":
        return "squashfs"
    if head[1024:1028] == b"\xe2\xe1\xf5\xe0":
        return "erofs"
    if head[1080:1082] == b"\x53\xef":
        return "ext4"
    return None


def replace_root(line: BootLine, modules: Modules) -> bool:
    """Make the root the boot line asks for. True when it is an image's own, False when it is
    the initramfs, with layers or without. Raises RootError."""
    foreign = line.rootfs_device is not None or line.rootfs_path is not None
    if not foreign and not line.layers:
        return False
    try:
        lowest = _lowest(line, modules) if foreign else "/"
        above = [_mount_device(device, modules) for device in line.layers]
        _enter(_overlay((*reversed(above), lowest), modules), foreign=foreign)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise RootError(f"the root file system: {what}{error.strerror}") from error
    return foreign


def _lowest(line: BootLine, modules: Modules) -> str:
    """The directory with the image's own root."""
    if line.rootfs_device is not None:
        return _mount_device(line.rootfs_device, modules)
    assert line.rootfs_path is not None
    for share in line.shares:
        if share.guest_path == line.rootfs_path:
            return _mount_root_share(share)
    return line.rootfs_path


def _mount_root_share(share: Share) -> str:
    target = _private("image")
    fault = mount_at(share._replace(writable=False), target)
    if fault is not None:
        raise RootError(f"the root file system ({share.tag}): {fault}")
    return target


def _mount_device(device: str, modules: Modules) -> str:
    """Mount a block device read-only; where."""
    head = _read_head(device)
    kind = file_system_of(head)
    if kind is None:
        raise RootError(f"{device} holds none of squashfs, erofs, ext4")
    modules.load((kind,))
    target = _private(device.rpartition("/")[2])
    # An ext4 whose journal was left dirty must not be written to.
    kernel.mount(device, target, kind, _PLAIN, "noload" if kind == "ext4" else "")
    return target


def _read_head(device: str) -> bytes:
    try:
        return read_start(device, _HEAD_BYTES)
    except FileNotFoundError:
        raise RootError(f"there is no block device {device}") from None


def _overlay(lower: Iterable[str], modules: Modules) -> str:
    """An overlay of directories, the topmost first, that is written to in memory; where."""
    modules.load(("overlay",))
    written = _private("written")
    kernel.mount("tmpfs", written, "tmpfs", kernel.MS_NODEV, "mode=0755")
    upper, work, root = f"{written}/upper", f"{written}/work", _private("root")
    for path in (upper, work):
        os.mkdir(path, 0o755)  # noqa: PTH102 - pathlib loads slowly
    options = f"lowerdir={':'.join(lower)},upperdir={upper},workdir={work}"
    kernel.mount("overlay", root, "overlay", 0, options)
    return root


def _enter(root: str, *, foreign: bool) -> None:
    """Make ``root`` the root of this process and of all it starts."""
    if foreign:
        _require_place(BASE, root)
        kernel.mount("/", root + BASE, None, kernel.MS_BIND)
        kernel.mount("/", root + BASE, None, kernel.MS_BIND | kernel.MS_REMOUNT | _PLAIN)
    for path in _MOVED:
        _require_place(path, root)
        kernel.mount(path, root + path, None, kernel.MS_MOVE)
    # The new root itself is below /run, which therefore stays behind, and so hidden.
    _require_place("/run", root)
    kernel.mount("tmpfs", root + "/run", "tmpfs", kernel.MS_NODEV | kernel.MS_NOSUID, "mode=0755")
    os.chdir(root)
    kernel.mount(".", "/", None, kernel.MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def _require_place(path: str, root: str) -> None:
    """See to it that a directory is there and no link on the way to it, so that an image can't
    lead a mount elsewhere. Nothing else runs yet that could put one there."""
    with place(path, root):
        return


def _private(name: str) -> str:
    path = f"{PRIVATE}/{name}"
    os.makedirs(path, mode=0o700, exist_ok=True)  # noqa: PTH103 - pathlib loads slowly
    return path
