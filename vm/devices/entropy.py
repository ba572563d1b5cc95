"""The entropy device (virtio 1.2, section 5.4): random bytes of the host's kernel."""

from __future__ import annotations

import os
from typing import ClassVar

from voidbus.vm.devices.device import RING_FEATURES, VirtioDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.virtqueue import Virtqueue

MAX_BYTES = 4096
"""What one buffer gets at most. A driver takes what it is given (5.4.6.2)."""

_QUEUE_SIZE = 16


class EntropyDevice(VirtioDevice):
    """Fills every buffer it is given."""

    device_id: ClassVar[int] = 4
    queue_sizes = (_QUEUE_SIZE,)
    features = RING_FEATURES

    def __init__(self) -> None:
        self._queue: Virtqueue | None = None
        self._later = False

    def attach(self, loop: EventLoop) -> None:
        self._loop = loop

    def config(self) -> bytes:
        return b""

    def queue_started(self, index: int, queue: Virtqueue) -> None:
        self._queue = queue

    def queue_stopped(self, index: int) -> None:
        self._queue = None

    def queue_notified(self, index: int) -> None:
        queue = self._queue
        if queue is None:
            return
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                break
            queue.push(chain, chain.write(os.urandom(min(chain.writable_bytes, MAX_BYTES))))
        queue.notify()
        if queue.enable_notifications() and not self._later:
            self._later = True
            self._loop.soon(self._go_on)

    def _go_on(self) -> None:
        self._later = False
        self.queue_notified(0)

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass
