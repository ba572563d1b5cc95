"""The calls of the kernel's vhost that are used here: numbers and structures of `linux/vhost.h` and
`linux/vhost_types.h`. A test compares all of them with the headers where those are installed."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from dataclasses import dataclass

_VIRTIO = 0xAF
_WRITE, _READ = 1, 2  # as seen from this process


class VringState(ctypes.Structure):
    """A number that concerns a queue."""

    c_name = "struct vhost_vring_state"
    _fields_ = [("index", u32), ("num", u32)]


class VringFile(ctypes.Structure):
    """A descriptor that a queue gets; -1 takes it away."""

    c_name = "struct vhost_vring_file"
    _fields_ = [("index", u32), ("fd", ctypes.c_int32)]


class VringAddr(ctypes.Structure):
    """Where a queue is, by addresses of this process."""

    c_name = "struct vhost_vring_addr"
    _fields_ = [
        ("index", u32),
        ("flags", u32),
        ("desc_user_addr", u64),
        ("used_user_addr", u64),
        ("avail_user_addr", u64),
        ("log_guest_addr", u64),
    ]


class MemoryRegion(ctypes.Structure):
    """A piece of guest memory and where it is in this process."""

    c_name = "struct vhost_memory_region"
    _fields_ = [
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
        ("flags_padding", u64),
    ]


NAMED = (VringState, VringFile, VringAddr, MemoryRegion)


@dataclass(frozen=True)
class Call:
    """An ioctl: its name, and its number."""

    name: str
    number: int


def _call(name: str, number: int, *, size: int = 0, way: int = 0) -> Call:
    return Call(name, way << 30 | size << 16 | _VIRTIO << 8 | number)


def _takes(name: str, number: int, structure: type[ctypes.Structure]) -> Call:
    return _call(name, number, size=ctypes.sizeof(structure), way=_WRITE)


GET_FEATURES = _call("VHOST_GET_FEATURES", 0x00, size=8, way=_READ)
SET_FEATURES = _call("VHOST_SET_FEATURES", 0x00, size=8, way=_WRITE)
SET_OWNER = _call("VHOST_SET_OWNER", 0x01)
# `struct vhost_memory` ends in an array that does not count.
SET_MEM_TABLE = _call("VHOST_SET_MEM_TABLE", 0x03, size=8, way=_WRITE)
SET_VRING_NUM = _takes("VHOST_SET_VRING_NUM", 0x10, VringState)
SET_VRING_ADDR = _takes("VHOST_SET_VRING_ADDR", 0x11, VringAddr)
SET_VRING_BASE = _takes("VHOST_SET_VRING_BASE", 0x12, VringState)
SET_VRING_KICK = _takes("VHOST_SET_VRING_KICK", 0x20, VringFile)
SET_VRING_CALL = _takes("VHOST_SET_VRING_CALL", 0x21, VringFile)
VSOCK_SET_GUEST_CID = _call("VHOST_VSOCK_SET_GUEST_CID", 0x60, size=8, way=_WRITE)
VSOCK_SET_RUNNING = _call("VHOST_VSOCK_SET_RUNNING", 0x61, size=4, way=_WRITE)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Call))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def vhost(
    fd: int, call: Call, argument: ctypes.Structure | ctypes._SimpleCData[int] | None = None
) -> None:
    """Make the call. Raises OSError, naming it."""
    place = None if argument is None else ctypes.addressof(argument)
    if _libc.ioctl(fd, call.number, place) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call.name}: {os.strerror(number)}")


def memory_table(regions: list[MemoryRegion]) -> ctypes.Structure:
    """`struct vhost_memory` with these regions."""

    class Memory(ctypes.Structure):
        _fields_ = [
            ("nregions", u32),
            ("padding", u32),
            ("regions", MemoryRegion * len(regions)),
        ]

    return Memory(len(regions), 0, tuple(regions))
