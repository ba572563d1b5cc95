"""Drivers that do anything: random registers and random memory end at worst their own device, with
a reason, and never by a defect of ours."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmio_driver import MmioDriver
from virtio_driver import guest_ram

from voidbus.vm.devices.block import BlockDevice
from voidbus.vm.devices.device import VirtioDevice
from voidbus.vm.devices.entropy import EntropyDevice
from voidbus.vm.devices.vsock import VsockDevice

RAM = 1 << 20


def refused(port: int) -> socket.socket:
    raise ConnectionRefusedError(port)


def disk(*, writable: bool) -> BlockDevice:
    file = os.memfd_create("disk")
    os.ftruncate(file, 1 << 16)
    return BlockDevice(file, "disk", writable=writable)


DEVICES: dict[str, Callable[[], VirtioDevice]] = {
    "read-only disk": lambda: disk(writable=False),
    "disk": lambda: disk(writable=True),
    "entropy": EntropyDevice,
    "vsock": lambda: VsockDevice(3, refused),
}

REGISTERS = (
    *(0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60),
    *(0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4, 0xAC, 0xB0, 0xC0, 0xFC, 0x100, 0x108),
)
small = st.integers(0, 40)
address = st.sampled_from([0x1000, 0x2000, 0x3000, 0x3800, RAM - 64, RAM, 1 << 31, 1])
value = st.one_of(small, address, st.integers(0, 2**32 - 1))
plain = st.tuples(
    st.just("write"),
    st.one_of(st.sampled_from(REGISTERS), st.integers(0, 0xFFF)),
    st.sampled_from([4, 4, 4, 4, 1, 2, 8]),
    value,
)
reading = st.tuples(
    st.just("read"), st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.just(0)
)
descriptor = st.builds(
    lambda where, length, flags, after: (
        where.to_bytes(8, "little")
        + length.to_bytes(4, "little")
        + flags.to_bytes(2, "little")
        + after.to_bytes(2, "little")
    ),
    st.one_of(address, st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 600), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 7), st.integers(0, 2**16 - 1)),
    st.one_of(st.integers(0, 8), st.integers(0, 2**16 - 1)),
)
memory = st.tuples(
    st.just("memory"),
    st.sampled_from([0x1000, 0x2000, 0x2002, 0x2004, 0x3000, 0x3800]),
    st.just(0),
    st.one_of(st.binary(max_size=64), st.lists(descriptor, max_size=8).map(b"".join)),
)
ready = st.tuples(st.just("ready"), st.integers(0, 3), st.sampled_from([1, 8, 16, 256]), st.just(0))
kick = st.tuples(st.just("write"), st.just(0x50), st.just(4), st.integers(0, 3))
program = st.lists(st.one_of(ready, memory, memory, kick, plain, reading), max_size=40)


def play(driver: MmioDriver, step: tuple[str, int, int, object]) -> None:
    kind, where, size, what = step
    match kind, what:
        case "write", int():
            driver.transport.write(where, size, what & (1 << 8 * size) - 1)
        case "read", _:
            driver.transport.read(where, size)
        case "memory", bytes():
            driver.ram.write(where, what)
        case "ready", _:
            if not driver.status & 4:
                driver.negotiate(1 << 32 | 1 << 28)
            driver.write(0x30, where)
            driver.write(0x38, size)
            for register, start in ((0x80, 0x1000), (0x90, 0x2000), (0xA0, 0x3000)):
                driver.write(register, start)
                driver.write(register + 4, 0)
            driver.write(0x44, 1)
            driver.write(0x70, driver.status | 4)


@pytest.mark.parametrize("name", DEVICES)
@settings(max_examples=60, deadline=None)
@given(steps=program)
def test_no_driver_brings_a_device_down_but_by_a_rule_it_broke(
    name: str, steps: list[tuple[str, int, int, object]]
) -> None:
    with guest_ram(RAM) as ram:
        driver = MmioDriver(DEVICES[name](), ram)
        try:
            for step in steps:
                play(driver, step)
            driver.settled()
        finally:
            driver.close()
        assert not any("defect" in failure for failure in driver.failures)
        assert len(driver.failures) <= 1
