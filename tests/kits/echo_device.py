"""A device that answers with what it is asked, and a vhost-user back end that serves it."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import ClassVar

from virtio_driver import WAIT

from voidbus.vm.devices.device import RING_FEATURES, VirtioDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.vhost_user import VhostUserBackend
from voidbus.vm.devices.virtqueue import Virtqueue


class EchoDevice(VirtioDevice):
    """Answers every request on queue 0 with its own content, and notes what it is told."""

    device_id: ClassVar[int] = 99

    def __init__(self) -> None:
        self.queue_sizes = (64, 64)
        self.features = RING_FEATURES
        self.calls: list[str] = []
        self.queues: dict[int, Virtqueue] = {}
        self.written = b""

    def attach(self, loop: EventLoop) -> None:
        self.calls.append("attach")

    def config(self) -> bytes:
        return b"configuration"

    def write_config(self, offset: int, data: bytes) -> None:
        self.written = data

    def negotiated(self, features: int) -> None:
        self.calls.append("negotiated")

    def queue_started(self, index: int, queue: Virtqueue) -> None:
        self.calls.append(f"start {index}")
        self.queues[index] = queue

    def queue_notified(self, index: int) -> None:
        ring = self.queues[index]
        while (chain := ring.pop()) is not None:
            ring.push(chain, chain.write(chain.read()))
        ring.enable_notifications()
        ring.notify()

    def queue_stopped(self, index: int) -> None:
        self.calls.append(f"stop {index}")
        del self.queues[index]

    def reset(self) -> None:
        assert not self.queues
        self.calls.append("reset")

    def close(self) -> None:
        self.calls.append("close")


class Served:
    """A back end in its own thread. ``failure`` waits for its reason."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.device = EchoDevice()
        self.failed: queue.Queue[str] = queue.Queue()
        self.loop = EventLoop("served", self.failed.put)
        VhostUserBackend(self.device, path, self.loop).listen()
        self.loop.start()

    def failure(self) -> str:
        return self.failed.get(timeout=WAIT)

    def quiet(self) -> None:
        """Wait until the loop has done all it was given."""
        done = threading.Event()
        if self.loop.call(done.set):
            assert done.wait(WAIT)

    def close(self) -> None:
        self.loop.close()
