"""The vhost-user back end: a front end as QEMU is one, and front ends that lie."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from echo_device import Served
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtio_driver import USER_BASE, DriverQueue, GuestRam, VhostUserFrontEnd


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    before = open_descriptors()
    made = Served(tmp_path / "vhost")
    yield made
    made.close()
    assert open_descriptors() <= before
    assert not made.path.exists()
    assert made.device.calls[-1] == "close"


@contextlib.contextmanager
def guest() -> Iterator[tuple[GuestRam, DriverQueue]]:
    ram = GuestRam(1 << 20)
    driver = DriverQueue(ram, 16)
    try:
        yield ram, driver
    finally:
        driver.close()
        ram.close()


@contextlib.contextmanager
def front_end(served: Served) -> Iterator[VhostUserFrontEnd]:
    made = VhostUserFrontEnd(served.path)
    try:
        yield made
    finally:
        made.close()


def echo(driver: DriverQueue, content: bytes) -> None:
    driver.add([content], [100])
    driver.kick()
    (done,) = driver.wait()
    assert done.data == content


# -- by the rules -------------------------------------------------------------------------


def test_a_driver_is_served_through_a_front_end(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.start(ram, [driver])
        for number in range(40):
            echo(driver, b"%d" % number)
        assert int.from_bytes(qemu.ask(17), "little") == 2
        assert qemu.config(13) == b"configuration"
        assert qemu.config(8, offset=9) == b"tion\0\0\0\0"
        qemu.do(25, struct.pack("<III", 2, 3, 0) + b"abc")
        assert served.device.written == b"abc"


def test_the_socket_is_its_owners_alone(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600


def test_requests_from_before_the_queue_started_are_served(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        driver.add([b"early"], [5])
        qemu.start(ram, [driver])
        assert driver.wait()[0].data == b"early"


def test_a_paused_machine_goes_on_and_the_device_keeps_its_state(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.start(ram, [driver])
        echo(driver, b"one")
        index = qemu.stop_queue(0)
        assert index == 1
        driver.add([b"two"], [5])
        driver.kick(always=True)
        qemu.start_queue(0, driver, index)
        assert driver.wait()[0].data == b"two"
        assert "reset" not in served.device.calls


def test_a_new_driver_begins_with_a_reset(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.start(ram, [driver])
        echo(driver, b"one")
        qemu.stop_queue(0)
        driver.restart()
        qemu.start_queue(0, driver, 0)
        echo(driver, b"two")
        assert served.device.calls[1:] == [
            *("negotiated", "start 0", "stop 0"),
            *("reset", "negotiated", "start 0"),
        ]


def test_a_memory_table_sent_again_moves_the_queues(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.start(ram, [driver])
        echo(driver, b"one")
        qemu.set_memory(ram)
        echo(driver, b"two")
        assert "reset" not in served.device.calls


def test_a_disabled_ring_rests_and_an_enabled_one_goes_on(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.start(ram, [driver])
        echo(driver, b"one")
        qemu.do(18, struct.pack("<II", 0, 0))
        driver.add([b"two"], [5])
        driver.kick(always=True)
        qemu.ask(1)
        assert driver.collect() == []
        qemu.do(18, struct.pack("<II", 0, 1))
        assert driver.wait()[0].data == b"two"


def test_without_protocol_features_rings_are_enabled_from_the_start(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.ask(1)
        qemu.send(2, struct.pack("<Q", 1 << 32))
        qemu.send(5, struct.pack("<IIQQQQ", 1, 0, 0, ram.size, USER_BASE, 0), [ram.fd])
        qemu.send(8, struct.pack("<II", 0, driver.size))
        addresses = (USER_BASE + a for a in (driver.desc, driver.used, driver.avail))
        qemu.send(9, struct.pack("<IIQQQQ", 0, 0, *addresses, 0))
        qemu.send(13, struct.pack("<Q", 0), [driver.call_fd])
        qemu.send(12, struct.pack("<Q", 0), [driver.kick_fd])
        echo(driver, b"hello")


def test_a_message_may_come_in_pieces(served: Served) -> None:
    with front_end(served) as qemu:
        for byte in struct.pack("<III", 24, 1, 12 + 4) + struct.pack("<III", 0, 4, 0) + b"....":
            qemu.sock.send(bytes([byte]))
            served.quiet()
        assert qemu.receive() == (24, struct.pack("<III", 0, 4, 0) + b"conf")


def test_when_the_front_end_goes_the_next_may_come(served: Served) -> None:
    with guest() as (ram, driver):
        for _ in range(3):
            driver.restart()
            with front_end(served) as qemu:
                qemu.start(ram, [driver])
                echo(driver, b"hello")
        assert served.failed.empty()


def test_a_second_front_end_waits_for_the_first(served: Served) -> None:
    with front_end(served) as first:
        assert first.ask(17)
        with front_end(served) as second:
            second.send(17)
            served.quiet()
            first.ask(17)
            first.close()
            assert second.receive()[0] == 17


# -- against the rules --------------------------------------------------------------------


U64 = struct.Struct("<Q")
STATE = struct.Struct("<II")


@pytest.mark.parametrize(
    ("request_", "payload", "reason"),
    [
        (0, b"", "not understood"),
        (4000, b"", "not understood"),
        (6, U64.pack(0), "not understood"),  # SET_LOG_BASE, not offered
        (2, b"short", "5 bytes of payload"),
        (2, U64.pack(1 << 60), "not offered"),
        (16, U64.pack(1 << 1), "not offered"),
        (8, STATE.pack(2, 16), "ring 2 of 2"),
        (8, STATE.pack(0, 3), "of size 3"),
        (8, STATE.pack(0, 1 << 31), "of size"),
        (8, STATE.pack(0, 128), "of size 128"),
        (11, STATE.pack(1 << 31, 0), "ring 2147483648"),
        (12, U64.pack(0), "0 descriptors"),
        (12, U64.pack(0x100), "polling"),
        (13, U64.pack(77), "ring 77"),
        (5, b"", "memory table"),
        (5, struct.pack("<II", 1, 0), "memory table"),
        (5, struct.pack("<II", 9, 0) + bytes(9 * 32), "memory table"),
        (5, struct.pack("<IIQQQQ", 1, 0, 0, 4096, 0, 0), "0 descriptors"),
        (24, struct.pack("<III", 0, 300, 0) + bytes(300), "300 bytes of configuration"),
        (24, struct.pack("<III", 0xFFFFFFFF, 4, 0) + bytes(4), "configuration"),
        (24, b"tiny", "without its header"),
        (25, struct.pack("<III", 0, 8, 0), "configuration"),
    ],
)
def test_a_message_out_of_order_ends_the_device_with_its_reason(
    served: Served, request_: int, payload: bytes, reason: str
) -> None:
    with front_end(served) as qemu:
        qemu.send(request_, payload)
        assert reason in served.failure()
        with pytest.raises(OSError):
            qemu.ask(1)


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<III", 1, 0, 0),  # no version
        struct.pack("<III", 1, 5, 0),  # an answer
        struct.pack("<III", 1, 1, 0xFFFFFFFF),  # a payload without end
    ],
)
def test_what_is_no_message_ends_the_device(served: Served, header: bytes) -> None:
    with front_end(served) as qemu:
        qemu.sock.send(header)
        assert "no message" in served.failure()


def test_more_descriptors_than_fit_are_closed_and_end_the_device(served: Served) -> None:
    with front_end(served) as qemu, Path("/dev/null").open() as null:
        qemu.send(1, b"", [null.fileno()] * 9)
        assert "too many descriptors" in served.failure()


def test_descriptors_nobody_asked_for_are_closed(served: Served) -> None:
    with front_end(served) as qemu, Path("/dev/null").open() as null:
        qemu.ask(1)
        before = open_descriptors()
        for _ in range(50):
            qemu.send(1, b"", [null.fileno()] * 8)
            qemu.receive()
        qemu.ask(1)
        assert open_descriptors() == before


def test_a_front_end_that_does_not_read_ends_the_device(served: Served) -> None:
    with front_end(served) as qemu:
        qemu.sock.settimeout(0.2)
        with contextlib.suppress(OSError):
            while True:
                qemu.send(24, struct.pack("<III", 0, 256, 0) + bytes(256))
        assert "does not read" in served.failure()


@pytest.mark.parametrize("kind", ["file", "shrinking"])
def test_a_kick_or_memory_of_the_wrong_kind_ends_the_device(
    served: Served, kind: str, tmp_path: Path
) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        if kind == "shrinking":
            fd = os.memfd_create("guest")
            os.ftruncate(fd, 1 << 20)
            qemu.send(5, struct.pack("<IIQQQQ", 1, 0, 0, 1 << 20, USER_BASE, 0), [fd])
            os.close(fd)
            assert "F_SEAL_SHRINK" in served.failure()
            return
        qemu.start(ram, [])
        (tmp_path / "file").touch()
        with (tmp_path / "file").open() as file:
            os.dup2(file.fileno(), driver.kick_fd)
        with contextlib.suppress(ConnectionError):
            qemu.start_queue(0, driver)
        assert "no kick" in served.failure()


def test_a_ring_outside_of_memory_ends_the_device(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.start(ram, [])
        driver.desc = ram.size + 4096
        with contextlib.suppress(ConnectionError):
            qemu.start_queue(0, driver)
        assert "not in the memory table" in served.failure()


def test_a_hostile_ring_ends_the_device(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        qemu.start(ram, [driver])
        driver.make_available(9999)
        driver.kick(always=True)
        assert "descriptor 9999" in served.failure()


def test_an_interrupt_into_a_full_eventfd_does_not_wait(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        os.set_blocking(driver.call_fd, True)
        qemu.start(ram, [driver])
        os.eventfd_write(driver.call_fd, (1 << 64) - 2)
        driver.add([b"x"], [1])
        driver.kick()
        served.quiet()
        qemu.ask(1)
        assert driver.wait()[0].data == b"x"


def test_a_kick_that_hangs_up_does_not_spin(served: Served) -> None:
    with guest() as (ram, driver), front_end(served) as qemu:
        reader, writer = os.pipe()
        os.dup2(reader, driver.kick_fd)
        os.close(reader)
        qemu.start(ram, [driver])
        os.close(writer)
        served.quiet()
        turns = 0

        def count() -> None:
            nonlocal turns
            turns = served.loop.turn(0)

        served.loop.call(count)
        served.quiet()
        assert turns <= 1


MESSAGES = st.tuples(
    st.integers(0, 40),
    st.sampled_from([1, 9]),
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            STATE.pack, st.integers(0, 3), st.sampled_from([0, 1, 2, 16, 64, 65, 0xFFFFFFFF])
        ),
        st.builds(U64.pack, st.sampled_from([0, 1, 2, 0x100, 1 << 30, 1 << 32, 1 << 63])),
        st.builds(
            lambda size, user, offset: struct.pack("<IIQQQQ", 1, 0, 0, size, user, offset),
            st.sampled_from([0, 4096, 1 << 20, 1 << 40]),
            st.sampled_from([0, USER_BASE, (1 << 64) - 1]),
            st.sampled_from([0, 4096, 100]),
        ),
        st.builds(
            lambda ring, places: struct.pack("<IIQQQQ", ring, 0, *places, 0),
            st.integers(0, 2),
            st.tuples(*[st.integers(0, 64).map(lambda page: USER_BASE + 4096 * page)] * 3),
        ),
    ),
    st.integers(0, 2),
)


@given(messages=st.lists(MESSAGES, max_size=30), seed=st.binary(min_size=16, max_size=64))
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_messages_end_the_device_at_worst(
    tmp_path: Path, messages: list[tuple[int, int, bytes, int]], seed: bytes
) -> None:
    before = open_descriptors()
    served = Served(tmp_path / "vhost")
    ram = GuestRam(1 << 20)
    ram.write(0, seed * (4096 * 8 // len(seed)))
    event = os.eventfd(0, os.EFD_NONBLOCK)
    kinds = [[], [ram.fd], [event]]
    qemu = VhostUserFrontEnd(served.path)
    with contextlib.suppress(OSError):
        for request, flags, payload, fds in messages:
            qemu.send(request, payload, kinds[fds], flags)
            os.eventfd_write(event, 1)
        qemu.sock.shutdown(socket.SHUT_WR)
        while qemu.sock.recv(4096):
            pass
    qemu.close()
    served.quiet()
    served.close()
    ram.close()
    os.close(event)
    assert served.failed.qsize() <= 1
    if not served.failed.empty():
        assert "defect" not in served.failed.get()
    assert open_descriptors() <= before
