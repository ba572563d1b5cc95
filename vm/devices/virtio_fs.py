"""The virtio file system device (virtio 1.2, section 5.11) over a shared directory."""

from __future__ import annotations

import struct

from voidbus.vm.devices.device import RING_FEATURES, VirtioDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.fuse_server import FuseServer
from voidbus.vm.devices.shared_directory import SharedDirectory
from voidbus.vm.devices.virtqueue import Virtqueue

DEVICE_ID = 26
"""A file system device (virtio 1.2, section 5)."""
TAG_BYTES = 36
"""The longest tag (virtio 1.2, 5.11.4)."""
QUEUE_SIZE = 1024
"""With less than some 260 entries the guest can't send requests of MAX_WRITE bytes: it needs a
descriptor for each page."""

QUEUE_SIZES = (QUEUE_SIZE, QUEUE_SIZE)
"""Queue 0 is for what goes first (FORGET), queue 1 for requests."""

_CONFIG = struct.Struct(f"<{TAG_BYTES}sI")
_REQUEST_QUEUES = 1
_REQUESTS_A_TURN = 32


def configuration(tag: str) -> bytes:
    """The device's configuration space (5.11.4). ValueError for a tag that is empty, too long or
    has a NUL."""
    name = tag.encode()
    if not 0 < len(name) <= TAG_BYTES or b"\0" in name:
        raise ValueError(f"{tag!r} is no tag of a mount: 1 to {TAG_BYTES} bytes, none NUL")
    return _CONFIG.pack(name, _REQUEST_QUEUES)


class VirtioFs(VirtioDevice):
    """One share as a device.

    A request waits for the host's disk. So the loop this device is attached to must have no other
    device.
    """

    device_id = DEVICE_ID
    queue_sizes = QUEUE_SIZES
    features = RING_FEATURES

    def __init__(self, share: SharedDirectory, tag: str) -> None:
        """``share`` is owned from now on. ``tag`` is what the guest mounts. ValueError as by
        ``configuration``."""
        self._config = configuration(tag)
        self._share = share
        self._server = FuseServer(share)
        self._queues: dict[int, Virtqueue] = {}
        self._loop: EventLoop | None = None

    def attach(self, loop: EventLoop) -> None:
        self._loop = loop

    def config(self) -> bytes:
        return self._config

    def queue_started(self, index: int, queue: Virtqueue) -> None:
        self._queues[index] = queue

    def queue_stopped(self, index: int) -> None:
        del self._queues[index]

    def queue_notified(self, index: int) -> None:
        queue = self._queues.get(index)
        if queue is None:
            return  # stopped since it was put off
        queue.disable_notifications()
        for _ in range(_REQUESTS_A_TURN):
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    break
                return
            queue.push(chain, self._server.serve(chain))
            queue.notify()
        if self._loop is not None:
            self._loop.soon(lambda: self.queue_notified(index))

    def reset(self) -> None:
        self._server.reset()

    def close(self) -> None:
        self._share.close()
