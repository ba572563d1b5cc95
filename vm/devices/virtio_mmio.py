"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2): a device's registers in memory.

Registers are read and written on the threads of vCPUs; what concerns the device itself is done on
its loop, and the vCPU waits for that. Kicks and interrupts are eventfds, so neither waits.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from voidbus.vm.devices.bus import Registers
from voidbus.vm.devices.device import (
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    Ring,
    VhostDevice,
    VirtioDevice,
)
from voidbus.vm.devices.event_loop import EDGE, READ, EventLoop
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.devices.virtqueue import RingAddresses, Virtqueue

REGISTERS_BYTES = 0x1000
"""What a device takes of the address space: a page."""
QUEUE_NOTIFY = 0x50
"""The register of kicks: writing a queue's number to it may signal its eventfd in ``kicks``."""

LOOP_SECONDS = 20.0
"""How long a vCPU waits for its device to take over what it wrote."""

_CONFIG = 0x100
_MAGIC, _VERSION = 0x7472_6976, 2
_VENDOR = 0x4253_4456  # ours; nobody looks at it
_NO_SHARED_MEMORY = (0xB0, 0xB4, 0xB8, 0xBC)  # all ones: a region that is not there (4.2.2)

# Device status bits (2.1).
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
NEEDS_RESET, FAILED = 64, 128
USED_BUFFER = 1
"""The bit of the interrupt status for a queue (4.2.2.1)."""


@dataclass
class _Queue:
    """What the driver has said of a queue."""

    max_size: int
    size: int = 0
    ready: bool = False
    descriptors: int = 0
    available: int = 0
    used: int = 0
    running: bool = False


# Halves of addresses: the register, the field, and by how much it is shifted.
_ADDRESSES = {
    0x80: ("descriptors", 0),
    0x84: ("descriptors", 32),
    0x90: ("available", 0),
    0x94: ("available", 32),
    0xA0: ("used", 0),
    0xA4: ("used", 32),
}


class VirtioMmio(Registers):
    """One device behind its registers. Owns the device from ``attach`` on, and its eventfds."""

    def __init__(
        self, device: VirtioDevice | VhostDevice, memory: GuestMemory, loop: EventLoop
    ) -> None:
        """``memory`` is the caller's and outlives this. Raises OSError."""
        self._device = device
        self._memory = memory
        self._loop = loop
        with contextlib.ExitStack() as undo:
            self.interrupt_fd = _eventfd(undo)
            """Written for each interrupt."""
            self.kicks = tuple(_eventfd(undo) for _ in device.queue_sizes)
            """One for each queue: a kick is a write."""
            self._open = undo.pop_all()
        self._lock = threading.Lock()  # for all below but the two after it
        self._status = 0
        self._device_features_half = self._driver_features_half = 0
        self._driver_features = 0
        self._selected = 0
        self._queues = [_Queue(size) for size in device.queue_sizes]
        self._interrupt_lock = threading.Lock()
        # Who serves the queues tells nobody here of an interrupt, and the driver has to find that
        # it was for a queue; the line is this device's alone.
        self._interrupts = USED_BUFFER if isinstance(device, VhostDevice) else 0
        self._interrupt_status = 0

    def attach(self) -> None:
        """Give the device its loop, before that starts. The loop's end closes the device."""
        self._loop.at_end(self._end)
        self._device.attach(self._loop)

    def close(self) -> None:
        """Close the eventfds, once the loop has ended and no vCPU runs. Again is fine."""
        self._open.close()

    # -- reading, on a vCPU's thread ------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        if offset >= _CONFIG:
            content = self._device.config()[offset - _CONFIG : offset - _CONFIG + size]
            return int.from_bytes(content, "little")
        if size != 4 or offset % 4:
            return 0
        if offset == 0x60:
            with self._interrupt_lock:
                return self._interrupt_status | self._interrupts
        with self._lock:
            return self._read_register(offset)

    def _read_register(self, offset: int) -> int:
        match offset:
            case 0x00:
                return _MAGIC
            case 0x04:
                return _VERSION
            case 0x08:
                return self._device.device_id
            case 0x0C:
                return _VENDOR
            case 0x10:
                half = self._device_features_half
                return self._device.features >> 32 * half if half < 2 else 0
            case 0x34:
                queue = self._queue
                return 0 if queue is None else queue.max_size
            case 0x44:
                queue = self._queue
                return 0 if queue is None else int(queue.ready)
            case 0x70:
                return self._status
        return -1 if offset in _NO_SHARED_MEMORY else 0

    @property
    def _queue(self) -> _Queue | None:
        return self._queues[self._selected] if self._selected < len(self._queues) else None

    # -- writing, on a vCPU's thread ------------------------------------------------------

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= _CONFIG:
            data = value.to_bytes(8, "little")[:size]
            with self._lock:
                self._on_loop(lambda: self._device.write_config(offset - _CONFIG, data))
        elif size != 4 or offset % 4:
            pass
        elif offset == QUEUE_NOTIFY:
            if value < len(self.kicks):
                _signal(self.kicks[value])
        elif offset == 0x64:
            with self._interrupt_lock:
                self._interrupt_status &= ~value
        else:
            with self._lock:
                self._write_register(offset, value)

    def _write_register(self, offset: int, value: int) -> None:
        match offset:
            case 0x14:
                self._device_features_half = value
            case 0x20:
                self._take_features(value)
            case 0x24:
                self._driver_features_half = value
            case 0x30:
                self._selected = value
            case 0x70:
                self._on_loop(lambda: self._set_status(value & 0xFF))
            case _:
                queue = self._queue
                if queue is not None:
                    self._write_queue(queue, offset, value)

    def _take_features(self, value: int) -> None:
        half = self._driver_features_half
        if half < 2 and not self._status & FEATURES_OK:
            kept = self._driver_features & ~(0xFFFF_FFFF << 32 * half)
            self._driver_features = kept | value << 32 * half

    def _write_queue(self, queue: _Queue, offset: int, value: int) -> None:
        if offset == 0x44:
            index = self._selected
            self._on_loop(lambda: self._set_ready(index, ready=bool(value & 1)))
        elif queue.ready:
            pass  # its place is fixed while it is in use (4.2.3.2)
        elif offset == 0x38:
            queue.size = value
        elif offset in _ADDRESSES:
            name, shift = _ADDRESSES[offset]
            kept = getattr(queue, name) & ~(0xFFFF_FFFF << shift)
            setattr(queue, name, kept | value << shift)

    def _on_loop(self, task: Callable[[], None]) -> None:
        """Have the loop do it, and wait. What it raises ends the loop, and with it the machine. A
        loop that has ended does nothing any more. Raises DeviceError where it takes too long."""
        done = threading.Event()

        def do() -> None:
            try:
                task()
            finally:
                done.set()

        if self._loop.call(do) and not done.wait(LOOP_SECONDS):
            raise DeviceError(
                f"a device of kind {self._device.device_id} did not answer its driver in "
                f"{LOOP_SECONDS:g} s"
            )

    # -- on the loop's thread -------------------------------------------------------------

    def _set_status(self, value: int) -> None:
        if not value:
            self._reset()
            return
        new = value & ~self._status
        # Bits are never taken back but by a reset (2.1.1); ours is not the driver's to set.
        if new & FEATURES_OK and not self._features_fit:
            new &= ~FEATURES_OK
        if new & DRIVER_OK and not (self._status | new) & FEATURES_OK:
            new &= ~DRIVER_OK
        self._status |= new & ~NEEDS_RESET
        if new & FEATURES_OK:
            self._device.negotiated(self._driver_features)
        if new & DRIVER_OK:
            for index in range(len(self._queues)):
                self._start(index)

    @property
    def _features_fit(self) -> bool:
        taken = self._driver_features
        return bool(taken & F_VERSION_1) and not taken & ~self._device.features

    def _set_ready(self, index: int, *, ready: bool) -> None:
        queue = self._queues[index]
        if ready == queue.ready:
            return
        if not ready:
            self._stop(index)
            queue.ready = False
        elif self._status & FEATURES_OK and not self._status & FAILED:
            queue.ready = True
            if self._status & DRIVER_OK:
                self._start(index)

    def _start(self, index: int) -> None:
        queue = self._queues[index]
        if not queue.ready or queue.running:
            return
        if queue.size > queue.max_size:
            raise DeviceError(f"queue {index} of size {queue.size}; {queue.max_size} at most")
        addresses = RingAddresses(queue.descriptors, queue.available, queue.used)
        device, kick = self._device, self.kicks[index]
        queue.running = True
        if isinstance(device, VhostDevice):
            device.ring_started(index, Ring(queue.size, addresses, kick, self.interrupt_fd))
            return
        running = Virtqueue(
            self._memory,
            queue.size,
            addresses,
            self._interrupt,
            event_idx=bool(self._driver_features & F_EVENT_IDX),
            indirect=bool(self._driver_features & F_INDIRECT_DESC),
        )
        # Edge-triggered, every write is told; so it need not be read (epoll(7)).
        self._loop.watch(kick, READ | EDGE, lambda _: device.queue_notified(index))
        device.queue_started(index, running)
        device.queue_notified(index)

    def _stop(self, index: int) -> None:
        queue = self._queues[index]
        if not queue.running:
            return
        try:
            self._device.queue_stopped(index)
        finally:
            queue.running = False
            self._loop.unwatch(self.kicks[index])

    def _reset(self) -> None:
        for index, queue in enumerate(self._queues):
            self._stop(index)
            self._queues[index] = _Queue(queue.max_size)
        self._device.reset()
        self._status = self._driver_features = self._selected = 0
        self._device_features_half = self._driver_features_half = 0
        with self._interrupt_lock:
            self._interrupt_status = 0

    def _interrupt(self) -> None:
        with self._interrupt_lock:
            self._interrupt_status |= USED_BUFFER
        _signal(self.interrupt_fd)

    def _end(self) -> None:
        try:
            self._reset()
        finally:
            self._device.close()


def _eventfd(undo: contextlib.ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    undo.callback(os.close, fd)
    return fd


def _signal(eventfd: int) -> None:
    with contextlib.suppress(BlockingIOError):  # full: it has been told often enough
        os.eventfd_write(eventfd, 1)
