"""Whatever guest and host do in whatever order: streams stay whole, memory stays bounded."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from dataclasses import dataclass, field

from guest_streams import GuestStream, GuestStreams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from virtio_driver import GuestRam
from vsock_guest import CID, Bench, VsockGuest

from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.vsock import RX, TX
from voidbus.vm.devices.vsock_connection import WINDOW
from voidbus.vm.devices.vsock_packets import Op
from voidbus.vm.devices.vsock_to_guest import MAX_RESETS

_DATA = memoryview(random.Random(7).randbytes(1 << 20))
_SIZES = st.sampled_from([1, 100, 4096, 5000, 70_000, 270_000])


@dataclass
class Pair:
    """Both ends of one stream, and what went in and came out at each."""

    stream: GuestStream | None
    host: socket.socket
    guest_sent: int = 0
    host_sent: int = 0
    host_received: bytearray = field(default_factory=bytearray)
    host_ended: bool = False
    broken: bool = False
    """One end was closed at once: the rest may be lost."""


class StreamModel(RuleBasedStateMachine):
    @initialize(
        event_idx=st.booleans(),
        buffers=st.sampled_from([(44, 4096), (4096,), (2000,), (20, 1000, 24)]),
        window=st.sampled_from([5000, 256 * 1024]),
    )
    def begin(self, event_idx: bool, buffers: tuple[int, ...], window: int) -> None:
        self.ram = GuestRam()
        guest = VsockGuest(self.ram, event_idx=event_idx, indirect=event_idx, buffers=buffers)
        self.bench = Bench(self.ram, guest)
        self.streams = GuestStreams(guest, window)
        self.streams.eager = False
        self.pairs: list[Pair] = []
        self.ports = iter(range(100, 1000))

    def pair(self, number: int) -> Pair:
        return self.pairs[number % len(self.pairs)]

    def rest(self) -> None:
        """Let everything happen that can."""
        for _ in range(20_000):
            moved = self.streams.pump()
            moved |= self.bench.kick()
            if not self.bench.loop.settle() and not moved:
                return
        raise AssertionError("device and guest never come to rest")

    @precondition(lambda self: len(self.pairs) < 4)
    @rule()
    def guest_connects(self) -> None:
        port = next(self.ports)
        stream = self.streams.connect(port, 5000 + port)
        self.rest()
        assert stream.open
        self.pairs.append(Pair(stream, self.bench.hosts[5000 + port][0]))

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(early=st.booleans())
    def host_connects(self, early: bool) -> None:
        port = next(self.ports)
        accepted: list[int] = []

        def on_accepted(local_port: int) -> bool:
            accepted.append(local_port)
            return True

        host = self.bench.host_connects(port, on_accepted=on_accepted)
        pair = Pair(None, host)
        if early:
            pair.host_sent += host.send(_DATA[:1000])
        self.rest()
        pair.stream = self.streams.streams[port, accepted[0]]
        self.pairs.append(pair)

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 3), size=_SIZES)
    def guest_sends(self, number: int, size: int) -> None:
        pair = self.pair(number)
        assert pair.stream is not None
        if not pair.stream.shutdown & 2 and pair.guest_sent + size < len(_DATA):
            pair.stream.to_send += _DATA[pair.guest_sent : pair.guest_sent + size]
            pair.guest_sent += size

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 3), size=_SIZES)
    def host_sends(self, number: int, size: int) -> None:
        pair = self.pair(number)
        with contextlib.suppress(OSError):
            pair.host_sent += pair.host.send(_DATA[pair.host_sent : pair.host_sent + size])

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 3), size=_SIZES)
    def host_reads(self, number: int, size: int) -> None:
        self.read(self.pair(number), size)

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 3), size=_SIZES)
    def guest_reads(self, number: int, size: int) -> None:
        stream = self.pair(number).stream
        assert stream is not None
        stream.consumed = min(len(stream.received), stream.consumed + size)

    @rule()
    def things_happen(self) -> None:
        self.rest()

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 3), flags=st.integers(1, 3))
    def guest_shuts_down(self, number: int, flags: int) -> None:
        pair = self.pair(number)
        assert pair.stream is not None
        pair.stream.shutdown |= flags
        pair.broken |= bool(flags & 1)

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 3))
    def host_shuts_down(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self.pair(number).host.shutdown(socket.SHUT_WR)

    @precondition(lambda self: self.pairs)
    @rule(number=st.integers(0, 3), by_guest=st.booleans())
    def breaks_off(self, number: int, by_guest: bool) -> None:
        pair = self.pair(number)
        assert pair.stream is not None
        self.check(pair)
        if by_guest and not pair.stream.reset:
            self.bench.guest.send(Op.RST, pair.stream.guest_port, pair.stream.host_port)
            self.streams.streams.pop((pair.stream.guest_port, pair.stream.host_port), None)
        pair.host.close()
        self.pairs.remove(pair)

    def read(self, pair: Pair, size: int) -> int:
        try:
            data = pair.host.recv(size)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            data = b""
        pair.host_ended |= not data
        pair.host_received += data
        return len(data)

    def check(self, pair: Pair) -> None:
        assert pair.stream is not None
        assert pair.host_received == _DATA[: len(pair.host_received)]
        assert pair.stream.received == _DATA[: len(pair.stream.received)]

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        try:
            self.finish()
        finally:
            self.bench.close()
            self.ram.close()

    def finish(self) -> None:
        # Everybody reads to the end: then nothing may be missing.
        self.streams.eager = True
        self.rest()
        while any(self.read(pair, 1 << 20) for pair in self.pairs):
            self.rest()
        for pair in self.pairs:
            stream = pair.stream
            assert stream is not None
            self.check(pair)
            if not pair.broken:
                assert len(pair.host_received) == pair.guest_sent
                assert len(stream.received) == pair.host_sent
                assert pair.host_ended == bool(stream.shutdown & 2)
        for pair in self.pairs:
            pair.host.close()
        self.rest()
        for host in self.bench.hosts.values():
            host[0].close()
        self.rest()
        device = self.bench.device
        assert device.stats.connections == 0
        assert device._windows == 0
        assert len(self.bench.loop._callbacks) == 1  # its own


StreamModel.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestStreamModel = StreamModel.TestCase


_PACKET = st.tuples(
    st.integers(0, 9),  # operation
    st.integers(1, 3),  # guest port
    st.sampled_from([5001, 5002, 9001, 1 << 30, (1 << 30) + 1]),
    st.sampled_from([0, 1, 44, 4000, 20_000]),  # bytes of data
    st.sampled_from([0, 1, 2, 3, 0xFFFFFFFF]),  # flags
    st.sampled_from([0, 1, 4096, WINDOW, 0xFFFFFFFF]),  # buf_alloc
    st.sampled_from([0, 1, 5000, 0x80000000, 0xFFFFFFFF]),  # fwd_cnt
    st.sampled_from([None, None, None, 0, 44, 0xFFFFFFFF]),  # length that is claimed
    st.sampled_from([1, 1, 1, 1, 2, 0, 65535]),  # type
    st.sampled_from([CID, CID, CID, 2, 1 << 33]),
)


@given(packets=st.lists(_PACKET, max_size=60), fills=st.booleans(), talks=st.booleans())
@settings(max_examples=60, deadline=None)
def test_random_packets_are_answered_or_dropped(
    packets: list[tuple[int, int, int, int, int, int, int, int | None, int, int]],
    fills: bool,
    talks: bool,
) -> None:
    ram = GuestRam()
    bench = Bench(ram, VsockGuest(ram))
    bench.host_connects(1)
    bench.host_connects(2).sendall(b"x" * 5000)
    for op, guest, host, size, flags, alloc, forwarded, length, kind, source in packets:
        if bench.guest.tx.free_descriptors < 2:
            break
        bench.guest.send(
            op,
            guest,
            host,
            bytes(size),
            flags=flags,
            buf_alloc=alloc,
            fwd_cnt=forwarded,
            length=length,
            kind=kind,
            src_cid=source,
        )
        bench.settle(fill=fills)
        for sock in (ours[-1] for ours in bench.hosts.values()):
            with contextlib.suppress(OSError):
                if talks:
                    sock.send(b"y" * 1000)
                    sock.recv(100_000)
        held = sum(len(c.backlog) for c in bench.device._connections.values())
        assert held <= WINDOW * bench.device.stats.connections
        assert len(bench.device._to_guest._resets) <= MAX_RESETS
    bench.close()
    assert bench.device.stats.connections == 0
    assert bench.loop.failed == []
    ram.close()


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=50, deadline=None)
def test_random_receive_buffers_are_filled_or_end_the_device(seed: int) -> None:
    """Buffers of any size and shape, some with nothing to write into."""
    chance = random.Random(seed)
    ram = GuestRam()
    bench = Bench(ram, VsockGuest(ram, size=16))
    host = bench.accept(1, 5000)
    try:
        for _ in range(20):
            rx = bench.guest.rx
            while rx.free_descriptors > 3:
                rooms = [chance.choice([1, 10, 44, 45, 300, 4096]) for _ in range(3)]
                rx.add(
                    readable=[b"r"] if chance.random() < 0.02 else [],
                    writable=rooms[: chance.randrange(1, 4)],
                )
            with contextlib.suppress(BlockingIOError):
                host.send(bytes(chance.choice([1, 5000, 60_000])))
            if chance.random() < 0.3:
                ram.write(rx.avail + 2, struct.pack("<H", chance.randrange(1 << 16)))
            bench.device.queue_notified(RX)
            bench.device.queue_notified(TX)
            bench.loop.settle()
            rx.collect()
    except (DeviceError, KeyError):
        pass  # KeyError: the driver itself does not know what it asked for
    finally:
        bench.close()
        ram.close()
