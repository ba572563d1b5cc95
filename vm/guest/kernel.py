"""The system calls of a booting machine that the standard library has no function for.

All of them go through the C library by ctypes; each raises OSError as the functions of
``os`` do. Constants are those of the kernel's headers, named beside them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct

MS_RDONLY = 1  # <linux/mount.h>, as all of these
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384

MNT_DETACH = 2  # <linux/fs.h>

RB_AUTOBOOT = 0x01234567  # <linux/reboot.h>, as all of these
RB_POWER_OFF = 0x4321FEDC
RB_DISABLE_CAD = 0

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>
_PR_SET_NO_NEW_PRIVS = 38

_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}  # <asm/unistd.h>
MODULE_INIT_COMPRESSED_FILE = 4  # <linux/module.h>

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def mount(source: str, target: str, kind: str | None, flags: int = 0, options: str = "") -> None:
    """mount(2): ``kind`` is the file system type, ``options`` its own comma-separated ones."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        os.fsencode(options) if options else None,
    )
    _check(result, target)


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def load_module(fd: int, flags: int = 0) -> None:
    """finit_module(2): load the kernel module that is open as ``fd``, without parameters."""
    number = _FINIT_MODULE[os.uname().machine]
    _check(_libc.syscall(ctypes.c_long(number), fd, b"", flags), "finit_module")


def reboot(command: int) -> None:
    """reboot(2) with one of the ``RB_`` commands. The ones that end the machine don't return."""
    _check(_libc.reboot(ctypes.c_int(command)), "reboot")


def become_subreaper() -> None:
    """prctl(2): make orphans anywhere below this process its children."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def give_up_new_privileges() -> None:
    """prctl(2), for this thread and all it starts: no exec gains privileges any more."""
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


_RNDADDENTROPY = 0x40085203  # <linux/random.h>


def add_entropy(seed: bytes) -> None:
    """Mix bytes into the kernel's random numbers and count all their bits (random(4))."""
    padded = seed + bytes(-len(seed) % 4)
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("=ii", len(seed) * 8, len(padded)) + padded)
    finally:
        os.close(fd)
