"""The virtio socket device as the host's kernel serves it, by `/dev/vhost-vsock`: data go between
the guest and sockets of AF_VSOCK without this process (vsock(7))."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import socket
import struct
from pathlib import Path
from typing import ClassVar

from voidbus.vm.devices import vhost_calls as calls
from voidbus.vm.devices.device import QUEUE_SIZE, RING_FEATURES, Ring, VhostDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.faults import QueueError
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.devices.vhost_calls import vhost
from voidbus.vm.devices.vsock_packets import F_STREAM

VHOST_VSOCK = Path("/dev/vhost-vsock")

CONNECT_SECONDS = 0.25
"""How long one try to connect may take: a driver that is not up yet is tried again."""

_RX, _TX, _QUEUES = 0, 1, 3
_SERVED = (_RX, _TX)  # nothing resets the transport, so the queue of events stays as it is
# Numbers that others are not likely to have picked; the kernel knows which are taken.
_FIRST_CID, _CIDS = 1 << 16, 1 << 30
_TRIES = 64


class VhostUnavailable(ValueError):
    """The kernel's vsock can't be used here: why, and what to do."""


class VhostVsock(VhostDevice):
    """The vsock of one guest, under a CID of its own. The guest reaches every listener of AF_VSOCK
    on the host, not only ours."""

    device_id: ClassVar[int] = 19

    def __init__(self, memory: GuestMemory, path: Path = VHOST_VSOCK) -> None:
        """``memory`` is the caller's and outlives this. Raises VhostUnavailable."""
        self.queue_sizes = (QUEUE_SIZE,) * _QUEUES
        self._memory = memory
        self._taken = 0
        self._started: set[int] = set()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise VhostUnavailable(
                f"{path} can't be opened: {error.strerror}; load the module vhost_vsock and see "
                "that this user may open it, or leave machines.kernel_vsock unset"
            ) from error
        try:
            offered = ctypes.c_uint64()
            vhost(self._fd, calls.GET_FEATURES, offered)
            # Streams are there without its saying so: the bit is newer (virtio 1.2, 5.10.3).
            self.features = offered.value & RING_FEATURES | F_STREAM
            vhost(self._fd, calls.SET_OWNER)
            self.cid = self._take_cid()
            """The guest's vsock address on this host."""
        except OSError as error:
            os.close(self._fd)
            raise VhostUnavailable(
                f"{path}: {error.strerror}; leave machines.kernel_vsock unset"
            ) from error

    def _take_cid(self) -> int:
        for _ in range(_TRIES):
            cid = _FIRST_CID + secrets.randbelow(_CIDS)
            try:
                vhost(self._fd, calls.VSOCK_SET_GUEST_CID, ctypes.c_uint64(cid))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return cid
        raise OSError(errno.EADDRINUSE, "no vsock address is free; end other machines")

    def connect(self, port: int) -> socket.socket:
        """A stream to a port of the guest, within CONNECT_SECONDS. Any thread. Raises OSError."""
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_SECONDS)
            sock.connect((self.cid, port))
            sock.settimeout(None)
        except BaseException:
            sock.close()
            raise
        return sock

    # -- the transport's ------------------------------------------------------------------

    def attach(self, loop: EventLoop) -> None:
        pass  # nothing of it happens in this process

    def config(self) -> bytes:
        return struct.pack("<Q", self.cid)

    def negotiated(self, features: int) -> None:
        self._taken = features & RING_FEATURES

    def ring_started(self, index: int, ring: Ring) -> None:
        if index not in _SERVED:
            return
        size, places = ring.size, ring.host_addresses(self._memory)
        try:
            if not self._started:
                vhost(self._fd, calls.SET_FEATURES, ctypes.c_uint64(self._taken))
                vhost(self._fd, calls.SET_MEM_TABLE, self._table())
            vhost(self._fd, calls.SET_VRING_NUM, calls.VringState(index, size))
            vhost(self._fd, calls.SET_VRING_BASE, calls.VringState(index, 0))
            place = calls.VringAddr(
                *(index, 0, places.descriptors, places.used, places.available, 0)
            )
            vhost(self._fd, calls.SET_VRING_ADDR, place)
            vhost(self._fd, calls.SET_VRING_KICK, calls.VringFile(index, ring.kick))
            vhost(self._fd, calls.SET_VRING_CALL, calls.VringFile(index, ring.interrupt))
            self._started.add(index)
            if self._started.issuperset(_SERVED):
                vhost(self._fd, calls.VSOCK_SET_RUNNING, ctypes.c_int(1))
        except OSError as error:
            raise QueueError(f"queue {index} of size {size}: {error.strerror}") from error

    def _table(self) -> ctypes.Structure:
        return calls.memory_table(
            [
                calls.MemoryRegion(region.address, region.size, region.host_address, 0)
                for region in self._memory.regions
            ]
        )

    def queue_stopped(self, index: int) -> None:
        if index in self._started:
            with contextlib.suppress(OSError):  # it did not run
                vhost(self._fd, calls.VSOCK_SET_RUNNING, ctypes.c_int(0))
            self._started.discard(index)

    def reset(self) -> None:
        self._started.clear()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
