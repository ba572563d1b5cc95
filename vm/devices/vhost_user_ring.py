"""What a vhost-user front end has said of one virtqueue."""

from __future__ import annotations

import os

from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.virtqueue import Virtqueue


class Ring:
    """One ring. It owns the eventfds of its kicks and its interrupts."""

    def __init__(self, number: int, max_size: int) -> None:
        self.number = number
        self.max_size = max_size
        self.size = 0
        self.addresses: tuple[int, int, int] | None = None
        """Descriptor table, available and used ring, in the front end's own address space."""
        self.index = 0
        """The next available entry when the queue starts."""
        self.stopped_at: int | None = None
        """Where the last driver's queue was when it stopped, if there was one."""
        self.enabled = False
        self.kick: int | None = None
        self.queue: Virtqueue | None = None
        """The queue, while it runs."""
        self._call: int | None = None

    @property
    def ready(self) -> bool:
        """Whether all is said that a queue needs to run."""
        return bool(self.enabled and self.kick is not None and self.size and self.addresses)

    def set_kick(self, fd: int | None) -> None:
        """Take over the eventfd the driver's kicks come by."""
        if self.kick is not None:
            os.close(self.kick)
        self.kick = fd

    def set_call(self, fd: int | None) -> None:
        """Take over the eventfd that interrupts the driver; None for a driver that polls."""
        if self._call is not None:
            os.close(self._call)
        self._call = fd
        if fd is None:
            return
        os.set_blocking(fd, False)
        if self.queue is not None:
            self.interrupt()  # what was sent by the one before may have been lost

    def interrupt(self) -> None:
        """Interrupt the driver. Raises DeviceError."""
        if self._call is None:
            return
        try:
            os.eventfd_write(self._call, 1)
        except BlockingIOError:
            pass  # its counter is full: the driver has been told often enough
        except OSError as error:
            raise DeviceError(f"vhost-user: an interrupt can't be sent: {error}") from error

    def clear(self) -> None:
        """Forget everything and close the descriptors. The queue is stopped already."""
        self.set_kick(None)
        self.set_call(None)
        self.size = 0
        self.addresses = None
        self.index = 0
        self.stopped_at = None
        self.enabled = False
