"""The network card against a driver and a socket: frames go both ways, whole and in order."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from mmio_driver import MmioDriver
from virtio_driver import WAIT, DriverQueue, guest_ram

from voidbus.vm.devices.network_card import F_MRG_RXBUF, RX, TX, NetworkCard
from voidbus.vm.network.frame_port import BACKLOG

MAC = "52:54:00:12:34:56"
HEADER = bytes(12)


class Card:
    """A card with a driver, and the other end of its socket."""

    def __init__(self, driver: MmioDriver, queues: list[DriverQueue], far: socket.socket) -> None:
        self.driver = driver
        self.rx, self.tx = queues
        self.far = far

    def next_frame(self) -> bytes:
        return self._exactly(int.from_bytes(self._exactly(4)))

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.far.recv(size - len(data))
            assert part
            data += part
        return data

    def send_from_host(self, *frames: bytes) -> None:
        self.far.sendall(b"".join(len(frame).to_bytes(4) + frame for frame in frames))


@contextlib.contextmanager
def card(*, mergeable: bool = True, indirect: bool = False) -> Iterator[Card]:
    near, far = socket.socketpair()
    far.settimeout(WAIT)
    with guest_ram() as ram, contextlib.ExitStack() as stack:
        stack.callback(far.close)
        driver = MmioDriver(NetworkCard(near, MAC, 32768), ram)
        stack.callback(driver.close)
        queues = []
        for _ in (RX, TX):
            queues.append(DriverQueue(ram, 64, event_idx=indirect, indirect=indirect))
            stack.callback(queues[-1].close)
        driver.start(queues, F_MRG_RXBUF if mergeable else 0)
        yield Card(driver, queues, far)
        assert not driver.failures


def test_a_card_tells_its_address_and_its_largest_packet() -> None:
    with card() as made:
        assert bytes(made.driver.read(0x100 + offset, 1) for offset in range(6)) == bytes.fromhex(
            MAC.replace(":", "")
        )
        assert made.driver.read(0x10A, 2) == 32768


@pytest.mark.parametrize("indirect", [False, True])
def test_frames_of_the_guest_arrive_in_order(indirect: bool) -> None:
    with card(indirect=indirect) as made:
        frames = [os.urandom(60 + 100 * number) for number in range(20)]
        for frame in frames:
            made.tx.add([HEADER, frame])
        made.tx.kick()
        assert [made.next_frame() for _ in frames] == frames
        assert len(made.tx.wait()) == 20


@pytest.mark.parametrize("indirect", [False, True])
def test_frames_for_the_guest_arrive_in_order(indirect: bool) -> None:
    with card(indirect=indirect) as made:
        for _ in range(20):
            made.rx.add([], [2048])
        made.rx.kick()
        frames = [os.urandom(60 + 50 * number) for number in range(20)]
        made.send_from_host(*frames)
        got: list[bytes] = []
        while len(got) < 20:
            got += [done.data for done in made.rx.wait()]
        assert got == [struct.pack("<10xH", 1) + frame for frame in frames]


def test_a_frame_larger_than_a_buffer_takes_several() -> None:
    with card() as made:
        for _ in range(4):
            made.rx.add([], [1000])
        made.rx.kick()
        frame = os.urandom(2500)
        made.send_from_host(frame)
        got: list[bytes] = []
        while len(got) < 3:
            got += [done.data for done in made.rx.wait()]
        assert b"".join(got) == struct.pack("<10xH", 3) + frame


def test_without_buffers_in_parts_a_frame_that_does_not_fit_is_dropped() -> None:
    with card(mergeable=False) as made:
        for _ in range(2):
            made.rx.add([], [1000])
        made.rx.kick()
        made.send_from_host(os.urandom(2500), b"x" * 60)
        assert [done.data for done in made.rx.wait()] == [struct.pack("<10xH", 1) + b"x" * 60]


def test_frames_wait_for_the_guest_to_have_buffers() -> None:
    with card() as made:
        frames = [bytes([number]) * 1000 for number in range(10)]
        made.send_from_host(*frames)
        got: list[bytes] = []
        for _ in frames:
            made.rx.add([], [1012])
            made.rx.kick()
            got += [done.data[12:] for done in made.rx.wait()]
        assert got == frames


def test_a_guest_that_sends_more_than_is_taken_waits_and_loses_nothing() -> None:
    with card() as made:
        frame = os.urandom(30_000)
        taken = sent = 0
        while sent < 40:
            made.tx.add([HEADER, frame])
            made.tx.kick()
            sent += 1
            made.driver.settled()
            taken += len(made.tx.collect())
        assert taken < 40
        assert 30_000 * taken < 2 * BACKLOG + (1 << 20)
        for _ in range(sent):
            assert made.next_frame() == frame
        while taken < 40:
            taken += len(made.tx.wait())


@pytest.mark.parametrize("content", [b"", HEADER[:5], HEADER, HEADER + bytes(70_000)])
def test_what_is_no_frame_is_dropped(content: bytes) -> None:
    with card() as made:
        made.tx.add([content or b"\0"])
        made.tx.add([HEADER, b"x" * 60])
        made.tx.kick()
        assert made.next_frame() == b"x" * 60


def test_a_guest_goes_on_without_the_other_end() -> None:
    with card() as made:
        made.far.close()
        for _ in range(3):
            made.tx.add([HEADER, b"x" * 60])
            made.tx.kick()
            assert len(made.tx.wait()) == 1


def test_a_receive_buffer_without_room_for_a_header_ends_the_device() -> None:
    with card() as made:
        made.rx.add([], [8])
        made.rx.kick()
        made.send_from_host(b"x" * 60)
        assert "a receive buffer of 8 bytes" in made.driver.failure()
        made.driver.failures.clear()
