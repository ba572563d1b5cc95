"""The serial port: what the guest writes arrives, and a driver finds what it looks for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.devices.serial_port import SerialPort


class Port:
    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.said = b""
        self.registers = SerialPort(self._put, self.eventfd)

    def _put(self, data: bytes) -> None:
        self.said += data

    def interrupts(self) -> int:
        try:
            return os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return 0


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    os.close(made.eventfd)


def write(port: Port, offset: int, value: int) -> None:
    port.registers.write(offset, 1, value)


def test_what_is_written_arrives_and_there_is_always_room(port: Port) -> None:
    for byte in b"hello\n":
        assert port.registers.read(5, 1) == 0x60
        write(port, 0, byte)
    assert port.said == b"hello\n"
    assert port.interrupts() == 0


def test_the_divisor_is_no_output_and_enables_no_interrupt(port: Port) -> None:
    write(port, 3, 0x80)
    write(port, 0, 1)
    write(port, 1, 2)
    write(port, 3, 0x03)
    assert port.said == b""
    assert port.registers.read(1, 1) == 0


def test_a_driver_that_waits_for_room_is_interrupted_until_it_has_asked_why(port: Port) -> None:
    write(port, 1, 2)
    assert port.interrupts() == 1
    assert [port.registers.read(2, 1) for _ in range(2)] == [2, 1]
    write(port, 0, 65)
    assert port.interrupts() == 1
    assert port.registers.read(2, 1) == 2
    write(port, 1, 0)
    write(port, 0, 66)
    assert port.interrupts() == 0
    assert port.said == b"AB"


def test_a_driver_that_tests_the_port_by_a_loop_finds_its_own_outputs(port: Port) -> None:
    assert port.registers.read(6, 1) == 0xB0
    write(port, 4, 0x1A)  # Linux: loop, OUT2, RTS
    assert port.registers.read(6, 1) & 0xF0 == 0x90
    write(port, 0, 65)
    assert port.said == b""


def test_it_has_no_queue_and_a_register_for_nothing(port: Port) -> None:
    write(port, 2, 1)
    assert port.registers.read(2, 1) == 1
    write(port, 7, 0x5A)
    assert port.registers.read(7, 1) == 0x5A


accesses = st.lists(
    st.tuples(st.booleans(), st.integers(0, 7), st.sampled_from([1, 2, 4]), st.integers(0, 2**32)),
    max_size=100,
)


@given(accesses)
def test_no_access_raises_and_every_answer_is_a_byte(
    program: list[tuple[bool, int, int, int]],
) -> None:
    port = Port()
    try:
        for writes, offset, size, value in program:
            if writes:
                port.registers.write(offset, size, value)
            else:
                assert 0 <= port.registers.read(offset, size) <= 0xFF
        assert len(port.said) <= len(program)
    finally:
        os.close(port.eventfd)
