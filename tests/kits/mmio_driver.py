"""A driver of virtio-mmio devices, as Linux has one (`drivers/virtio/virtio_mmio.c`), without a
guest: it reads and writes the registers from the test's own thread."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

from virtio_driver import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    WAIT,
    DriverQueue,
    GuestRam,
    guest_ram,
)

from voidbus.vm.devices.device import VhostDevice, VirtioDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.devices.virtio_mmio import VirtioMmio


class MmioDriver:
    """Registers of one device, and a driver's habits."""

    def __init__(self, device: VirtioDevice | VhostDevice, ram: GuestRam) -> None:
        self.ram = ram
        self.failures: list[str] = []
        self._failed = threading.Event()
        self._memory: GuestMemory = ram.memory()
        self.loop = EventLoop("device", self._fail)
        self.transport = VirtioMmio(device, self._memory, self.loop)
        self.transport.attach()
        self.loop.start()

    def _fail(self, reason: str) -> None:
        self.failures.append(reason)
        self._failed.set()

    def failure(self) -> str:
        """Why the device ended, once it has."""
        assert self._failed.wait(WAIT)
        return self.failures[0]

    def read(self, offset: int, size: int = 4) -> int:
        return self.transport.read(offset, size) & (1 << 8 * size) - 1

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.transport.write(offset, size, value)

    @property
    def status(self) -> int:
        return self.read(0x70)

    def offered(self) -> int:
        """The feature bits the device offers."""
        low_high = []
        for half in (0, 1):
            self.write(0x14, half)
            low_high.append(self.read(0x10))
        return low_high[0] | low_high[1] << 32

    def negotiate(self, features: int) -> None:
        """Reset, and take these features; the queues are next."""
        self.write(0x70, 0)
        for bit in (1, 2):
            self.write(0x70, self.status | bit)
        for half in (0, 1):
            self.write(0x24, half)
            self.write(0x20, features >> 32 * half & 0xFFFF_FFFF)
        self.write(0x70, self.status | 8)

    def set_queue(self, index: int, queue: DriverQueue) -> None:
        """Tell of a queue, and take its kicks and interrupts over."""
        self.write(0x30, index)
        self.write(0x38, queue.size)
        areas = ((0x80, queue.desc), (0x90, queue.avail), (0xA0, queue.used))
        for register, address in areas:
            self.write(register, address & 0xFFFF_FFFF)
            self.write(register + 4, address >> 32)
        self.write(0x44, 1)
        os.dup2(self.transport.kicks[index], queue.kick_fd, inheritable=False)
        os.dup2(self.transport.interrupt_fd, queue.call_fd, inheritable=False)

    def start(self, queues: Sequence[DriverQueue], features: int = 0) -> None:
        """All of it; ``features`` besides those the queues use."""
        features |= F_VERSION_1
        if any(queue.event_idx for queue in queues):
            features |= F_EVENT_IDX
        if any(queue.indirect for queue in queues):
            features |= F_INDIRECT_DESC
        self.negotiate(features)
        assert self.status & 8, f"features {features:#x} are not accepted"
        for index, queue in enumerate(queues):
            self.set_queue(index, queue)
        self.write(0x70, self.status | 4)

    def settled(self) -> None:
        """Wait until the loop has done what came before."""
        done = threading.Event()
        if self.loop.call(done.set):
            assert done.wait(WAIT)

    def close(self) -> None:
        self.loop.close()
        self.transport.close()
        self._memory.close()


@contextlib.contextmanager
def driven(
    device: VirtioDevice, queues: int = 1, *, size: int = 16, indirect: bool = False
) -> Iterator[tuple[MmioDriver, list[DriverQueue]]]:
    """A started device with its queues. At the end it has not failed."""
    with guest_ram() as ram, contextlib.ExitStack() as stack:
        driver = MmioDriver(device, ram)
        stack.callback(driver.close)
        made = []
        for _ in range(queues):
            made.append(DriverQueue(ram, size, event_idx=indirect, indirect=indirect))
            stack.callback(made[-1].close)
        driver.start(made)
        yield driver, made
        assert not driver.failures
