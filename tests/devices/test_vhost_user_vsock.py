"""The socket device as a machine uses it: threads, sockets, a front end and a guest."""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guest_streams import ECHO, SINK, GuestStreams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtio_driver import WAIT, DriverQueue, GuestRam, VhostUserFrontEnd
from vsock_guest import CID, VsockGuest

from voidbus.vm.devices import vsock_sockets
from voidbus.vm.devices.vhost_user_vsock import VhostUserVsock
from voidbus.vm.devices.vsock_packets import Op

MEGA = 1 << 20


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


class Rig:
    """A device with its guest, connected through vhost-user as QEMU would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sockets = folder / "v.sock"
        self.failed: queue.Queue[str] = queue.Queue()
        self.device = VhostUserVsock(
            folder / "vhost.sock", self.sockets, CID, name="rig", on_failed=self.failed.put
        )
        self.device.start()
        self.ram = GuestRam(8 * MEGA)
        self.guest = VsockGuest(self.ram, size=128, event_idx=True, indirect=True)
        self.event = DriverQueue(self.ram, 16)
        self.streams = GuestStreams(self.guest)
        self.qemu = VhostUserFrontEnd(folder / "vhost.sock")
        self.start()

    def start(self) -> None:
        self.guest.fill()
        self.qemu.start(self.ram, [self.guest.rx, self.guest.tx])

    def run(self, until: Callable[[], bool]) -> None:
        self.streams.run(until)

    def connect(self, port: int) -> socket.socket:
        """A stream of this process to the guest, accepted."""
        before = len(self.streams.streams)
        sock = self.device.connect(port)
        sock.setblocking(False)
        self.run(lambda: len(self.streams.streams) > before)
        return sock

    def close(self) -> None:
        self.qemu.close()
        self.device.close()
        self.guest.close()
        self.event.close()
        self.ram.close()


@pytest.fixture(autouse=True)
def _take_turns() -> Iterator[None]:
    """Guest and device are two threads of one interpreter here, and neither rests."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    before = open_descriptors()
    threads = threading.active_count()
    made = Rig(tmp_path)
    yield made
    made.close()
    assert open_descriptors() <= before
    assert threading.active_count() == threads
    assert list(tmp_path.glob("v*.sock")) == []
    assert made.failed.empty()


def read_all(rig: Rig, sock: socket.socket, size: int, most: int = 1 << 17) -> bytes:
    """Read ``size`` bytes, fewer only if it ends, at most ``most`` at a time."""
    got = bytearray()
    ended = False

    def more() -> bool:
        nonlocal ended
        with contextlib.suppress(BlockingIOError):
            data = sock.recv(min(most, size - len(got)))
            got.extend(data)
            ended = not data
        return ended or len(got) >= size

    rig.run(more)
    return bytes(got)


def closed(sock: socket.socket) -> bool:
    """Whether the stream has ended, reading what is left."""
    try:
        return sock.recv(65536) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


# -- streams ------------------------------------------------------------------------------


def test_eight_megabytes_go_to_a_guest_and_back_unchanged(rig: Rig) -> None:
    with rig.connect(ECHO) as sock:
        data = random.Random(1).randbytes(8 * MEGA)
        got = bytearray()
        sent = 0

        def move() -> bool:
            nonlocal sent
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(data[sent : sent + 100_000])
            with contextlib.suppress(BlockingIOError):
                got.extend(sock.recv(70_000))
            return len(got) >= len(data)

        rig.run(move)
        assert got == data
        sock.shutdown(socket.SHUT_WR)
        assert read_all(rig, sock, 1) == b""


def test_a_slow_reader_in_the_guest_holds_the_host_and_loses_nothing(rig: Rig) -> None:
    with rig.connect(SINK) as sock:
        (stream,) = rig.streams.streams.values()
        rig.streams.eager = False
        data = random.Random(2).randbytes(2 * MEGA)
        sent = 0
        while len(stream.received) < len(data):
            before = len(stream.received)

            def move(before: int = before) -> bool:
                nonlocal sent
                with contextlib.suppress(BlockingIOError):
                    sent += sock.send(data[sent : sent + 100_000])
                full = len(stream.received) - stream.consumed == stream.window
                return full or len(stream.received) == len(data)

            rig.run(move)
            assert sent - len(stream.received) <= MEGA
            stream.consumed += min(len(stream.received) - stream.consumed, 200_000)
            rig.guest.send(Op.CREDIT_UPDATE, SINK, stream.host_port, fwd_cnt=stream.consumed)
            stream.told = stream.consumed
        assert bytes(stream.received) == data


def test_a_slow_reader_at_the_host_holds_the_guest_and_loses_nothing(rig: Rig) -> None:
    with rig.connect(SINK) as sock:
        (stream,) = rig.streams.streams.values()
        data = random.Random(3).randbytes(2 * MEGA)
        stream.to_send += data
        rig.run(lambda: not stream.credit)
        assert stream.sent < len(data)
        stream.shutdown = 2
        assert read_all(rig, sock, len(data), most=5000) == data
        assert read_all(rig, sock, 1) == b""


def test_two_hundred_connections_at_once(rig: Rig) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(rig.device.connect(ECHO)) for _ in range(200)]
        for number, sock in enumerate(socks):
            sock.setblocking(False)
            sock.sendall(b"%05d" % number)
        waiting = dict(enumerate(socks))

        def answered() -> bool:
            for number, sock in list(waiting.items()):
                with contextlib.suppress(BlockingIOError):
                    assert sock.recv(100) == b"%05d" % number
                    del waiting[number]
            return not waiting

        rig.run(answered)
        assert rig.device.stats.connections == 200
    rig.run(lambda: rig.device.stats.connections == 0)


def test_a_refused_connection_ends(rig: Rig) -> None:
    with rig.device.connect(5555) as sock:
        sock.setblocking(False)
        rig.run(lambda: closed(sock))
    assert rig.device.stats.refused == 1


def test_a_busy_stream_does_not_starve_another(rig: Rig) -> None:
    with rig.connect(SINK) as busy, rig.connect(ECHO) as quiet:
        rounds = 0

        def move() -> bool:
            nonlocal rounds
            with contextlib.suppress(BlockingIOError):
                while True:
                    busy.send(bytes(65536))
            with contextlib.suppress(BlockingIOError):
                if not rounds or quiet.recv(10):
                    quiet.send(b"ping")
                    rounds += 1
            return rounds == 20

        rig.run(move)


# -- the host's sockets -------------------------------------------------------------------


def dial(rig: Rig, text: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(WAIT)
    sock.connect(str(rig.sockets))
    sock.setblocking(False)
    sock.sendall(text)
    return sock


def test_a_program_of_the_host_connects_by_the_convention(rig: Rig) -> None:
    assert stat.S_IMODE(rig.sockets.stat().st_mode) == 0o600
    with dial(rig, b"CONNECT 7\nhello") as sock:
        line = read_all(rig, sock, 14)
        assert line.startswith(b"OK ")
        assert line.endswith(b"\n")
        assert int(line[3:]) >= 1 << 30
        assert read_all(rig, sock, 5) == b"hello"


def test_a_greeting_may_come_byte_by_byte(rig: Rig) -> None:
    with dial(rig, b"") as sock:
        for byte in b"CONNECT 7\r\n":
            sock.send(bytes([byte]))
        assert read_all(rig, sock, 3) == b"OK "


@pytest.mark.parametrize(
    "greeting",
    [b"GET / HTTP/1.1\r\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 99999999999\n", b"\n"],
)
def test_any_other_greeting_is_hung_up_on(rig: Rig, greeting: bytes) -> None:
    with dial(rig, greeting) as sock:
        rig.run(lambda: closed(sock))


def test_a_greeting_without_end_is_hung_up_on(rig: Rig) -> None:
    with dial(rig, b"C" * 40) as sock:
        rig.run(lambda: closed(sock))


def test_a_port_beyond_32_bits_is_hung_up_on(rig: Rig) -> None:
    with dial(rig, b"CONNECT 4294967296\n") as sock:
        rig.run(lambda: closed(sock))


def test_a_client_that_says_nothing_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock_sockets, "GREETING_SECONDS", 0.01)
    made = Rig(tmp_path)
    with dial(made, b"CONN") as sock:
        made.run(lambda: closed(sock))
    made.close()


def test_a_client_that_goes_away_in_its_greeting_leaves_nothing(rig: Rig) -> None:
    before = open_descriptors()
    for _ in range(20):
        dial(rig, b"CONNE").close()
    rig.run(lambda: open_descriptors() <= before)


def test_the_guest_reaches_a_socket_of_the_host_by_its_port(rig: Rig) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{rig.sockets}_5000")
        listener.listen()
        stream = rig.streams.connect(40000, 5000)
        rig.run(lambda: stream.open)
        host, _ = listener.accept()
        with host:
            stream.to_send += b"to the host"
            stream.shutdown = 2
            host.setblocking(False)
            assert read_all(rig, host, 100) == b"to the host"
            host.sendall(b"to the guest")
        rig.run(lambda: stream.reset)
        assert stream.received == b"to the guest"
    rig.run(lambda: rig.device.stats.connections == 0)


def test_a_port_without_a_socket_is_refused_and_so_is_one_nobody_serves(rig: Rig) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(f"{rig.sockets}_5001")
        for port in (5000, 5001):
            stream = rig.streams.connect(40000, port)
            rig.run(lambda stream=stream: stream.reset)  # type: ignore[misc]
            assert not stream.open


@pytest.mark.needs("socat")
def test_socat_talks_to_a_guest(rig: Rig) -> None:
    with subprocess.Popen(
        ["socat", "-t5", "-", f"UNIX-CONNECT:{rig.sockets}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as socat:
        assert socat.stdin is not None
        assert socat.stdout is not None
        socat.stdin.write(b"CONNECT 7\nhello from socat")
        socat.stdin.close()
        rig.run(lambda: socat.poll() is not None)
        assert socat.stdout.read().endswith(b"\nhello from socat")


# -- beginning and end --------------------------------------------------------------------


def test_closing_with_open_connections_frees_everything(tmp_path: Path) -> None:
    before = open_descriptors()
    threads = threading.active_count()
    made = Rig(tmp_path)
    socks = [made.connect(ECHO) for _ in range(20)]
    pending = made.device.connect(ECHO)
    greeting = dial(made, b"CONNECT")
    made.device.close()
    made.device.close()
    for sock in (*socks, pending, greeting):
        sock.settimeout(WAIT)
        assert closed(sock)
        sock.close()
    with pytest.raises(ConnectionError):
        made.device.connect(ECHO)
    made.close()
    assert open_descriptors() <= before
    assert threading.active_count() == threads


def test_it_is_not_running_before_its_start_nor_after_a_failure(tmp_path: Path) -> None:
    failed: queue.Queue[str] = queue.Queue()
    device = VhostUserVsock(tmp_path / "a", tmp_path / "b", CID, name="test", on_failed=failed.put)
    with pytest.raises(ConnectionError):
        device.connect(1)
    device.start()
    with device.connect(1) as waiting:
        with contextlib.closing(VhostUserFrontEnd(tmp_path / "a")) as qemu:
            qemu.send(4000)
            assert "4000" in failed.get(timeout=WAIT)
        waiting.settimeout(WAIT)
        assert waiting.recv(1) == b""
    with pytest.raises(ConnectionError):
        device.connect(1)
    device.close()
    assert failed.empty()


def test_what_can_not_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    for vhost, sockets, cid in (
        (tmp_path / "a", tmp_path / "b", 2),
        (tmp_path / "a", tmp_path / "b", 1 << 32),
        (long, tmp_path / "b", CID),
        (tmp_path / "a", long, CID),
    ):
        with pytest.raises(ValueError):
            VhostUserVsock(vhost, sockets, cid, name="test", on_failed=print)


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    before = open_descriptors()
    device = VhostUserVsock(
        tmp_path / "a", tmp_path / "missing" / "b", CID, name="test", on_failed=print
    )
    with pytest.raises(OSError):
        device.start()
    device.close()
    assert not (tmp_path / "a").exists()
    assert open_descriptors() <= before


def test_a_driver_that_comes_again_is_served_again(rig: Rig) -> None:
    old = rig.connect(ECHO)
    for number in (0, 1):
        rig.qemu.stop_queue(number)
    for ring in (rig.guest.rx, rig.guest.tx):
        ring.restart()
    rig.streams.streams.clear()
    rig.start()
    old.settimeout(WAIT)
    assert closed(old)
    old.close()
    with rig.connect(ECHO) as sock:
        sock.sendall(b"again")
        assert read_all(rig, sock, 5) == b"again"


def test_a_front_end_that_dies_ends_its_streams_and_another_may_come(rig: Rig) -> None:
    old = rig.connect(ECHO)
    rig.qemu.close()
    old.settimeout(WAIT)
    assert closed(old)
    old.close()
    for ring in (rig.guest.rx, rig.guest.tx):
        ring.restart()
    rig.streams.streams.clear()
    rig.qemu = VhostUserFrontEnd(rig.folder / "vhost.sock")
    rig.start()
    with rig.connect(ECHO) as sock:
        sock.sendall(b"again")
        assert read_all(rig, sock, 5) == b"again"


def test_a_lying_guest_ends_the_device_with_its_reason(tmp_path: Path) -> None:
    made = Rig(tmp_path)
    sock = made.connect(ECHO)
    made.guest.tx.make_available(31000)
    made.guest.tx.kick(always=True)
    assert "31000" in made.failed.get(timeout=WAIT)
    sock.settimeout(WAIT)
    assert closed(sock)
    sock.close()
    made.close()


@given(seed=st.integers(0, 1 << 32))
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_guest_memory_ends_the_device_at_worst(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    made = Rig(tmp_path)
    sock = made.connect(ECHO)
    rings = (made.guest.rx, made.guest.tx)
    for _ in range(30):
        ring = chance.choice(rings)
        area, size = chance.choice(
            [(ring.desc, 16 * 128), (ring.avail, 260), (ring.used, 1030), (4096, MEGA)]
        )
        spot = chance.randrange(size - 8)
        made.ram.write(area + spot, chance.randbytes(chance.choice([1, 2, 8])))
        if chance.random() < 0.5:
            index = (ring.avail_index + chance.randrange(8)) & 0xFFFF
            made.ram.write(ring.avail + 2, struct.pack("<H", index))
        for each in rings:
            each.kick(always=True)
        with contextlib.suppress(OSError):
            sock.send(b"x" * chance.choice([1, 5000]))
    made.device.close()
    sock.close()
    made.close()
    assert made.failed.qsize() <= 1
    if not made.failed.empty():
        assert "defect" not in made.failed.get()
