"""The virtio-mmio transport, register by register (virtio 1.2, section 4.2)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from mmio_driver import MmioDriver, driven
from virtio_driver import DriverQueue, GuestRam, guest_ram

from voidbus.vm.devices.device import RING_FEATURES, VirtioDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.virtqueue import Virtqueue


class Echo(VirtioDevice):
    """Writes what it reads, and remembers what the transport does."""

    device_id = 42
    queue_sizes = (16, 8)
    features = RING_FEATURES | 1 << 5

    def __init__(self) -> None:
        self.calls: list[object] = []
        self._queues: dict[int, Virtqueue] = {}

    def attach(self, loop: EventLoop) -> None:
        self.calls.append("attach")

    def config(self) -> bytes:
        return b"0123456789"

    def write_config(self, offset: int, data: bytes) -> None:
        self.calls.append((offset, data))

    def negotiated(self, features: int) -> None:
        self.calls.append(features)

    def queue_started(self, index: int, queue: Virtqueue) -> None:
        self.calls.append(f"start {index}")
        self._queues[index] = queue

    def queue_notified(self, index: int) -> None:
        queue = self._queues[index]
        while True:
            while (chain := queue.pop()) is not None:
                queue.push(chain, chain.write(chain.read()))
            queue.notify()
            if not queue.enable_notifications():
                return

    def queue_stopped(self, index: int) -> None:
        self.calls.append(f"stop {index}")
        del self._queues[index]

    def reset(self) -> None:
        self.calls.append("reset")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with guest_ram() as made:
        yield made


@pytest.fixture
def driver(ram: GuestRam) -> Iterator[MmioDriver]:
    made = MmioDriver(Echo(), ram)
    yield made
    made.close()


@contextlib.contextmanager
def queue_in(ram: GuestRam, size: int = 8) -> Iterator[DriverQueue]:
    queue = DriverQueue(ram, size)
    try:
        yield queue
    finally:
        queue.close()


def test_a_device_tells_what_it_is(driver: MmioDriver) -> None:
    assert [driver.read(offset) for offset in (0x00, 0x04, 0x08)] == [0x74726976, 2, 42]
    assert driver.offered() == Echo.features
    driver.write(0x14, 2)
    assert driver.read(0x10) == 0


def test_a_device_tells_the_sizes_of_its_queues_and_of_no_others(driver: MmioDriver) -> None:
    sizes = []
    for index in (0, 1, 2, 0xFFFF_FFFF):
        driver.write(0x30, index)
        sizes.append((driver.read(0x34), driver.read(0x44)))
    assert sizes == [(16, 0), (8, 0), (0, 0), (0, 0)]


def test_the_configuration_is_read_in_any_width_and_ends_in_zeros(driver: MmioDriver) -> None:
    assert driver.read(0x100, 1) == ord("0")
    assert driver.read(0x102, 2) == int.from_bytes(b"23", "little")
    assert driver.read(0x108, 8) == int.from_bytes(b"89", "little")
    assert driver.read(0xFFC, 4) == 0


def test_the_configuration_is_written_through_to_the_device(driver: MmioDriver) -> None:
    device = driver.transport._device
    assert isinstance(device, Echo)
    driver.write(0x104, 0x0201, size=2)
    assert device.calls[-1] == (4, b"\x01\x02")


def test_there_is_no_shared_memory(driver: MmioDriver) -> None:
    driver.write(0xAC, 0)
    assert [driver.read(offset) for offset in (0xB0, 0xB4)] == [0xFFFF_FFFF] * 2


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4), (0, 8), (0x70, 1)])
def test_registers_are_read_whole_or_not_at_all(driver: MmioDriver, offset: int, size: int) -> None:
    assert driver.read(offset, size) == 0
    driver.write(0x70, 1, size=1)
    assert driver.status == 0


def test_features_that_are_not_offered_are_refused(driver: MmioDriver) -> None:
    driver.negotiate(1 << 32 | 1 << 7)
    assert driver.status == 3


def test_a_driver_without_virtio_1_is_refused(driver: MmioDriver) -> None:
    driver.negotiate(1 << 5)
    assert driver.status == 3


def test_features_can_not_change_once_they_are_agreed(driver: MmioDriver) -> None:
    device = driver.transport._device
    assert isinstance(device, Echo)
    driver.negotiate(1 << 32 | 1 << 5)
    assert driver.status == 11
    driver.write(0x24, 0)
    driver.write(0x20, 0)
    driver.write(0x70, driver.status | 4)
    assert device.calls[-1] == 1 << 32 | 1 << 5


def test_status_bits_are_not_taken_back_but_by_a_reset(driver: MmioDriver) -> None:
    driver.negotiate(1 << 32)
    driver.write(0x70, 1)
    assert driver.status == 11
    driver.write(0x70, 0)
    assert driver.status == 0


def test_a_device_does_not_run_before_its_features_are_agreed(
    driver: MmioDriver, ram: GuestRam
) -> None:
    with queue_in(ram) as queue:
        driver.write(0x70, 4)
        assert driver.status == 0
        driver.set_queue(0, queue)
        assert driver.read(0x44) == 0


def test_a_queue_does_not_run_before_the_driver_is_ready(driver: MmioDriver, ram: GuestRam) -> None:
    device = driver.transport._device
    assert isinstance(device, Echo)
    with queue_in(ram) as queue:
        driver.negotiate(1 << 32)
        driver.set_queue(1, queue)
        assert driver.read(0x44) == 1
        assert "start 1" not in device.calls
        driver.write(0x70, driver.status | 4)
        assert "start 1" in device.calls
        assert "start 0" not in device.calls


def test_requests_are_answered_and_the_driver_is_interrupted() -> None:
    with driven(Echo(), 2, size=8) as (driver, queues):
        for number in range(50):
            for queue in queues:
                queue.add([b"%d" % number], [8])
                queue.kick()
                assert [done.data for done in queue.wait()] == [b"%d" % number]
        assert driver.read(0x60) == 1
        driver.write(0x64, 1)
        assert driver.read(0x60) == 0


def test_a_kick_by_the_register_is_as_good_as_one_by_the_eventfd() -> None:
    with driven(Echo(), size=8) as (driver, (queue,)):
        queue.add([b"hello"], [8])
        driver.write(0x50, 0)
        assert [done.data for done in queue.wait()] == [b"hello"]
        for number in (1, 2, 7, 0xFFFF_FFFF):  # a queue that does not run, and none
            driver.write(0x50, number)
        queue.add([b"again"], [8])
        driver.write(0x50, 0)
        assert [done.data for done in queue.wait()] == [b"again"]


def test_the_place_of_a_queue_is_fixed_while_it_is_in_use() -> None:
    with driven(Echo(), size=8) as (driver, (queue,)):
        driver.write(0x30, 0)
        for register in (0x38, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4):
            driver.write(register, 0xFFFF_FFFF)
        queue.add([b"hello"], [8])
        queue.kick()
        assert [done.data for done in queue.wait()] == [b"hello"]


def test_a_queue_is_stopped_and_starts_anew_elsewhere() -> None:
    device = Echo()
    with driven(device, size=8) as (driver, _), queue_in(driver.ram) as other:
        driver.write(0x30, 0)
        driver.write(0x44, 0)
        assert device.calls[-1] == "stop 0"
        driver.set_queue(0, other)
        other.add([b"hello"], [8])
        other.kick()
        assert [done.data for done in other.wait()] == [b"hello"]


def test_a_reset_stops_the_queues_and_a_new_driver_starts_from_nothing() -> None:
    device = Echo()
    with driven(device, size=8) as (driver, (queue,)):
        driver.write(0x70, 0)
        assert device.calls[-2:] == ["stop 0", "reset"]
        assert (driver.status, driver.read(0x60), driver.read(0x44)) == (0, 0, 0)
        queue.restart()
        driver.start([queue])
        queue.add([b"hello"], [8])
        queue.kick()
        assert [done.data for done in queue.wait()] == [b"hello"]


@pytest.mark.parametrize("size", [0, 3, 32, 0xFFFF_FFFF])
def test_a_queue_of_a_size_that_can_not_be_ends_the_device(
    driver: MmioDriver, ram: GuestRam, size: int
) -> None:
    with queue_in(ram) as queue:
        driver.negotiate(1 << 32)
        driver.set_queue(0, queue)
        driver.write(0x44, 0)
        driver.write(0x38, size)
        driver.write(0x44, 1)
        driver.write(0x70, driver.status | 4)
        assert f"size {size}" in driver.failure()
        # Whoever asks it now is answered all the same.
        driver.write(0x70, 0)
        assert driver.read(0x00) == 0x74726976


def test_a_queue_outside_of_memory_ends_the_device(driver: MmioDriver, ram: GuestRam) -> None:
    with queue_in(ram) as queue:
        driver.negotiate(1 << 32)
        queue.used = 1 << 40
        driver.set_queue(0, queue)
        driver.write(0x70, driver.status | 4)
        assert "used ring is outside of memory" in driver.failure()


def test_the_end_of_the_loop_closes_the_device_and_the_eventfds_stay(ram: GuestRam) -> None:
    device = Echo()
    driver = MmioDriver(device, ram)
    driver.loop.close()
    assert device.calls[-2:] == ["reset", "close"]
    driver.write(0x50, 0)
    assert os.eventfd_read(driver.transport.kicks[0]) == 1
    driver.write(0x70, 1)
    assert driver.status == 0
    driver.close()
