"""A device of a machine of ours that another program serves, by vhost-user: the front end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from voidbus.vm.devices.device import RING_FEATURES, Ring, VhostDevice
from voidbus.vm.devices.event_loop import READ, EventLoop
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.memory import GuestMemory, SharedRegion
from voidbus.vm.devices.vhost_user_back_end import ANSWER_SECONDS, BackEnd, BackEndError


class VhostUserDevice(VhostDevice):
    """Any kind of device; a subclass has its ``device_id``. Owns the connection to its back end.

    Each message to that waits for its answer. So the loop this device is attached to must have no
    other device. ``hang_up`` comes before the loop is ended, or that waits too.
    """

    def __init__(
        self,
        config: bytes,
        queue_sizes: tuple[int, ...],
        back_end: BackEnd,
        memory: GuestMemory,
        regions: Sequence[SharedRegion],
        *,
        ending: Callable[[], str],
        patience: float = ANSWER_SECONDS,
    ) -> None:
        """Greets the back end, which must not be served by this thread, and may have just been
        started: it has ``patience`` seconds. ``memory`` and ``regions`` are one, are the caller's
        and outlive this. ``ending`` tells how the back end's process has ended, once it has gone.
        Raises DeviceError."""
        self.queue_sizes = queue_sizes
        self._config = config
        self._back_end = back_end
        self._memory = memory
        self._regions = regions
        self._ending = ending
        self._taken = 0
        self._started: set[int] = set()
        self._loop: EventLoop | None = None
        try:
            self.features = back_end.greet(len(queue_sizes), patience) & RING_FEATURES
        except BackEndError as error:
            raise self._told(error) from error

    def hang_up(self) -> None:
        """The machine ends: stop the back end, whatever it is at. Any thread; again is fine."""
        self._back_end.hang_up()

    def attach(self, loop: EventLoop) -> None:
        self._loop = loop
        loop.watch(self._back_end.fileno(), READ, lambda _: self._heard())

    def config(self) -> bytes:
        return self._config

    def negotiated(self, features: int) -> None:
        self._taken = features

    def ring_started(self, index: int, ring: Ring) -> None:
        ring.host_addresses(self._memory)  # must be there, whatever a back end made of others
        try:
            if not self._started:
                self._back_end.set_up(self._taken, self._regions)
            areas, kick, interrupt = ring.addresses, ring.kick, ring.interrupt
            self._back_end.start_ring(index, ring.size, areas, kick, interrupt)
        except BackEndError as error:
            raise self._told(error) from error
        self._started.add(index)

    def queue_stopped(self, index: int) -> None:
        self._started.discard(index)
        if self._back_end.over:
            return  # which has stopped all of them
        try:
            self._back_end.stop_ring(index)
        except BackEndError as error:
            raise self._told(error) from error

    def reset(self) -> None:
        self._started.clear()

    def close(self) -> None:
        if self._loop is not None:
            self._loop.unwatch(self._back_end.fileno())
        self._back_end.close()

    def _heard(self) -> None:
        if self._back_end.over:
            if self._loop is not None:
                self._loop.unwatch(self._back_end.fileno())
            return
        # Answers are read where they are waited for.
        raise self._told(BackEndError("vhost-user: the back end has gone, or speaks unasked"))

    def _told(self, error: BackEndError) -> DeviceError:
        """The error that ends the device; a machine that ends itself asks for no reasons."""
        if self._back_end.over:
            return error
        self._back_end.hang_up()
        return DeviceError(f"{error} ({self._ending()})")
