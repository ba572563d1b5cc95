"""What every virtio device is, whatever carries its registers and interrupts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.devices.virtqueue import RingAddresses, Virtqueue

# Feature bits (virtio 1.2, section 6).
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32

RING_FEATURES = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
"""What ``Virtqueue`` can do: a device adds these to its own."""


QUEUE_SIZE = 1024
"""The size of queue to offer: QEMU's virtio-mmio lets a driver choose up to 1024
(VIRTQUEUE_MAX_SIZE), whatever the device says, and Linux takes the most it is given."""


class Device(ABC):
    """A device, driven by a transport: the vhost-user back end, or virtio-mmio.

    A transport calls everything below on the thread of one ``EventLoop``, in this order:
    ``attach`` once; then for every driver ``negotiated``, the start of each queue the driver uses
    (not always all of them), ``queue_stopped``, and ``reset``; at last ``close``.

    Nothing here may wait, but for a device that has a loop of its own. An exception from any of
    these ends the device, and with it the machine: a DeviceError (QueueError, GuestMemoryError)
    with its text as the reason; any other is a defect of ours.

    Descriptors of the host: a device registers them with the loop it was attached to
    (``loop.watch``), and unregisters and closes them in ``reset`` or ``close``. Threads of a
    device's own come back to the loop with ``loop.call``.
    """

    device_id: ClassVar[int]
    """The kind (virtio 1.2, section 5: 19 is a socket device, 26 a file system)."""

    queue_sizes: tuple[int, ...]
    """The largest size of each queue; how many queues there are."""

    features: int
    """The feature bits offered, RING_FEATURES among them."""

    @abstractmethod
    def attach(self, loop: EventLoop) -> None:
        """Remember the loop, and watch what is to be watched before any driver comes."""

    @abstractmethod
    def config(self) -> bytes:
        """The device's configuration space, as the driver reads it. Any thread may ask."""

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027 -- few devices care
        """The driver wrote to the configuration space. Ignored unless a device says otherwise."""

    def negotiated(self, features: int) -> None:  # noqa: B027 -- few devices care
        """The feature bits the driver took, a part of ``features``."""

    @abstractmethod
    def queue_stopped(self, index: int) -> None:
        """Queue ``index`` stops when this returns: push what was popped now, or it is lost, and
        forget the queue. Only for started queues."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the driver: all state it made. Queues are stopped already. Again is fine."""

    @abstractmethod
    def close(self) -> None:
        """Release every descriptor and thread. The loop still runs, for the last time. Again is
        fine."""


class VirtioDevice(Device):
    """A device that serves its queues itself. ``queue_notified`` is called again and again while
    a queue runs. A queue may be stopped and go on later (the machine was paused, its memory map
    changed): ``queue_started`` is then called with another ``Virtqueue`` and without a ``reset``
    before it."""

    @abstractmethod
    def queue_started(self, index: int, queue: Virtqueue) -> None:
        """Queue ``index`` runs: from now on it may be popped and pushed. ``queue_notified``
        follows at once, as chains may be waiting."""

    @abstractmethod
    def queue_notified(self, index: int) -> None:
        """The driver kicked. Take at most ``queue.size`` chains; with more waiting, come back by
        ``loop.soon`` so that other descriptors get their turn. Only for started queues."""


@dataclass(frozen=True)
class Ring:
    """A queue for whoever serves it beside this process. ``kick`` and ``interrupt`` are eventfds
    of the transport's: the driver's writes, and ours to the driver."""

    size: int
    addresses: RingAddresses
    kick: int
    interrupt: int

    def host_addresses(self, memory: GuestMemory) -> RingAddresses:
        """Where its areas are in this process, each of them whole in one region of memory. Raises
        GuestMemoryError."""
        # With what the event indices take (virtio 1.2, 2.7.6 and 2.7.8).
        return RingAddresses(
            memory.host_address(self.addresses.descriptors, 16 * self.size),
            memory.host_address(self.addresses.available, 6 + 2 * self.size),
            memory.host_address(self.addresses.used, 6 + 8 * self.size),
        )


class VhostDevice(Device):
    """A device whose queues somebody else serves: the host's kernel (vhost), or another process
    (vhost-user)."""

    @abstractmethod
    def ring_started(self, index: int, ring: Ring) -> None:
        """Queue ``index`` runs, in this ring."""
