"""The socket device in the host's kernel: a driver of a few packets, and sockets of AF_VSOCK."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmio_driver import MmioDriver
from virtio_driver import WAIT, DriverQueue, GuestRam, guest_ram
from vsock_guest import Packet, VsockGuest

from voidbus.vm.devices.vhost_vsock import VhostUnavailable, VhostVsock
from voidbus.vm.devices.vsock_packets import Op

PORT = 1234
SIZE = 64


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with guest_ram() as made:
        yield made


def test_a_host_without_it_is_told_what_to_do(ram: GuestRam, tmp_path: Path) -> None:
    with pytest.raises(VhostUnavailable, match=r"nowhere can't be opened: .*; load the module"):
        VhostVsock(ram.memory(), tmp_path / "nowhere")


def test_a_file_that_is_no_vhost_is_told_and_closed(ram: GuestRam, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VhostUnavailable, match="VHOST_GET_FEATURES"):
        VhostVsock(ram.memory(), tmp_path / "file")


class Rig:
    """The device behind its registers, and a guest that is the test's own."""

    def __init__(self, ram: GuestRam, stack: contextlib.ExitStack) -> None:
        self.memory = ram.memory()
        stack.callback(self.memory.close)
        self.device = VhostVsock(self.memory)
        self.driver = MmioDriver(self.device, ram)
        stack.callback(self.driver.close)
        self.ram = ram
        self._stack = stack
        self.guest: VsockGuest

    def start(self) -> None:
        """Start the driver, or start it again."""
        self.guest = VsockGuest(self.ram, size=SIZE, cid=self.device.cid)
        events = DriverQueue(self.ram, SIZE)
        for each in (self.guest, events):
            self._stack.callback(each.close)
        self.driver.start([self.guest.rx, self.guest.tx, events])
        self.guest.fill()
        self.guest.rx.kick()

    def expect(self, op: Op) -> Packet:
        """The next packet of this kind; what else comes is let be."""
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:
            for packet in self.guest.take():
                if packet.op == op:
                    return packet
            select.select([self.guest.rx.call_fd], [], [], 1.0)
            self.guest.rx.interrupts()
        raise AssertionError(f"no packet {op.name} came")

    def connected(self) -> tuple[socket.socket, Packet]:
        """A stream to the guest, accepted; and what the host asked with."""
        found: list[socket.socket] = []

        def connect() -> None:
            deadline = time.monotonic() + WAIT
            while not found and time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    found.append(self.device.connect(PORT))

        thread = threading.Thread(target=connect)
        thread.start()
        request = self.expect(Op.REQUEST)
        self.guest.send(Op.RESPONSE, PORT, request.host_port)
        self.guest.tx.kick()
        thread.join(WAIT)
        self._stack.callback(found[0].close)
        found[0].settimeout(WAIT)
        return found[0], request


@pytest.fixture
def rig(ram: GuestRam) -> Iterator[Rig]:
    with contextlib.ExitStack() as stack:
        yield Rig(ram, stack)


@pytest.mark.needs("vhost-vsock")
class TestInTheKernel:
    def test_a_stream_carries_bytes_both_ways_past_this_process(self, rig: Rig) -> None:
        rig.start()
        stream, request = rig.connected()
        stream.sendall(b"from the host")
        assert rig.expect(Op.RW).data.startswith(b"from the host")
        rig.guest.send(Op.RW, PORT, request.host_port, b"from the guest")
        rig.guest.tx.kick()
        assert stream.recv(100) == b"from the guest"

    def test_the_driver_finds_that_each_interrupt_was_for_a_queue(self, rig: Rig) -> None:
        assert rig.driver.read(0x60) == 1
        rig.driver.write(0x64, 1)
        assert rig.driver.read(0x60) == 1

    def test_a_driver_that_starts_again_is_served_again(self, rig: Rig) -> None:
        rig.start()
        rig.connected()
        rig.driver.write(0x70, 0)
        rig.start()
        stream, _ = rig.connected()
        stream.sendall(b"again")
        assert rig.expect(Op.RW).data.startswith(b"again")

    def test_a_guest_has_an_address_of_its_own(self, rig: Rig, ram: GuestRam) -> None:
        with contextlib.ExitStack() as stack:
            other = Rig(ram, stack)
            assert other.device.cid != rig.device.cid
            address = int.from_bytes(other.device.config(), "little")
            assert (other.driver.read(0x100, 8), address) == (other.device.cid, other.device.cid)

    @pytest.mark.parametrize("register", [0x80, 0x90, 0xA0])
    def test_a_queue_outside_memory_ends_the_device(
        self, rig: Rig, ram: GuestRam, register: int
    ) -> None:
        with contextlib.closing(DriverQueue(ram, SIZE)) as queue:
            rig.driver.negotiate(1 << 32)
            rig.driver.set_queue(0, queue)
            rig.driver.write(0x44, 0)
            rig.driver.write(register + 4, 0x10)
            rig.driver.write(0x44, 1)
            rig.driver.write(0x70, rig.driver.status | 4)
            assert "are not guest memory" in rig.driver.failure()

    def test_a_queue_of_no_power_of_two_ends_the_device(self, rig: Rig, ram: GuestRam) -> None:
        with contextlib.closing(DriverQueue(ram, SIZE)) as queue:
            rig.driver.negotiate(1 << 32)
            queue.size = 3
            rig.driver.set_queue(0, queue)
            rig.driver.write(0x70, rig.driver.status | 4)
            assert "queue 0 of size 3" in rig.driver.failure()
