"""A guest's socket layer over VsockGuest: streams with credit, as Linux keeps them."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from virtio_driver import WAIT
from vsock_guest import GUEST_WINDOW, Packet, VsockGuest

from voidbus.vm.devices.vsock_packets import Op

ECHO = 7
"""A port that sends back what it receives, and ends when its peer ends."""
SINK = 9
"""One that only receives. Ports from 1000 on refuse."""

_CHUNK = 4096


class GuestStream:
    """One connection of the guest. A test reads ``received`` and appends to ``to_send``."""

    def __init__(self, guest_port: int, host_port: int, window: int) -> None:
        self.guest_port = guest_port
        self.host_port = host_port
        self.window = window
        self.open = False
        self.reset = False
        self.received = bytearray()
        self.consumed = 0
        """Bytes the guest's program has read: what the device is told as fwd_cnt."""
        self.told = 0
        self.ended = False
        """The host sends no more."""
        self.to_send = bytearray()
        self.sent = 0
        self.peer_alloc = 0
        self.peer_forwarded = 0
        self.shutdown = 0
        """Flags to send once everything is sent."""
        self.shutdown_sent = 0

    @property
    def credit(self) -> int:
        credit = self.peer_alloc - ((self.sent - self.peer_forwarded) & 0xFFFFFFFF)
        assert credit >= 0, "the device took credit back"
        return credit


class GuestStreams:
    """All streams of a guest. ``pump`` does what the guest's kernel can do at the moment."""

    def __init__(self, guest: VsockGuest, window: int = GUEST_WINDOW) -> None:
        self.guest = guest
        self.window = window
        self.streams: dict[tuple[int, int], GuestStream] = {}
        self.eager = True
        """Whether the guest's programs read as soon as there is something."""

    def connect(self, guest_port: int, host_port: int) -> GuestStream:
        stream = GuestStream(guest_port, host_port, self.window)
        self.streams[guest_port, host_port] = stream
        self._send(stream, Op.REQUEST)
        return stream

    def pump(self) -> bool:
        """Whether anything moved."""
        packets = self.guest.take()
        self.guest.fill()
        for packet in packets:
            self._receive(packet)
        moved = bool(packets)
        for key, stream in list(self.streams.items()):
            moved |= self._advance(stream)
            if stream.reset:
                del self.streams[key]
        return moved

    def run(self, until: Callable[[], bool], seconds: float = WAIT) -> None:
        """Pump by interrupts, with a device that has a thread, until something is so. Fails
        when nothing has moved for so many seconds."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        for queue in (self.guest.rx, self.guest.tx):
            poll.register(queue.call_fd, select.POLLIN)
        while True:
            moved = self.pump()
            self.guest.tx.collect()
            self.guest.tx.kick()
            self.guest.rx.kick()
            if until():
                return
            if moved:
                deadline = time.monotonic() + seconds
            else:
                left = deadline - time.monotonic()
                # A test's own sockets may be what moves on, so it looks again soon.
                if left <= 0:
                    raise TimeoutError("the guest's streams do not get on")
                poll.poll(min(left, 0.002) * 1000)
                self.guest.rx.interrupts()
                self.guest.tx.interrupts()

    def _send(self, stream: GuestStream, op: int, data: bytes = b"", flags: int = 0) -> None:
        self.guest.send(
            op,
            stream.guest_port,
            stream.host_port,
            data,
            flags=flags,
            buf_alloc=stream.window,
            fwd_cnt=stream.consumed,
        )
        stream.told = stream.consumed

    def _receive(self, packet: Packet) -> None:
        key = (packet.guest_port, packet.host_port)
        stream = self.streams.get(key)
        if packet.op == Op.REQUEST:
            assert stream is None
            self._accept(packet)
            return
        if stream is None:
            if packet.op != Op.RST:
                self.guest.send(Op.RST, *key)
            return
        stream.peer_alloc, stream.peer_forwarded = packet.buf_alloc, packet.fwd_cnt
        if packet.op == Op.RESPONSE:
            assert not stream.open
            stream.open = True
        elif packet.op == Op.RW:
            assert stream.open
            assert not stream.ended
            stream.received += packet.data
            assert len(stream.received) - stream.consumed <= stream.window, "beyond the credit"
        elif packet.op == Op.SHUTDOWN:
            stream.ended |= bool(packet.flags & 2)
            if packet.flags == 3:
                self._send(stream, Op.RST)
                stream.reset = True
        elif packet.op == Op.RST:
            stream.reset = True
        elif packet.op == Op.CREDIT_REQUEST:
            self._send(stream, Op.CREDIT_UPDATE)

    def _accept(self, packet: Packet) -> None:
        if packet.guest_port >= 1000:
            self.guest.send(Op.RST, packet.guest_port, packet.host_port)
            return
        stream = GuestStream(packet.guest_port, packet.host_port, self.window)
        stream.open = True
        stream.peer_alloc, stream.peer_forwarded = packet.buf_alloc, packet.fwd_cnt
        self.streams[packet.guest_port, packet.host_port] = stream
        self._send(stream, Op.RESPONSE)

    def _advance(self, stream: GuestStream) -> bool:
        if not stream.open or stream.reset:
            return False
        moved = False
        if self.eager and stream.consumed < len(stream.received):
            new = stream.received[stream.consumed :]
            stream.consumed += len(new)
            moved = True
            if stream.guest_port == ECHO:
                stream.to_send += new
        if stream.guest_port == ECHO and stream.ended:
            stream.shutdown = 3
        self.guest.tx.collect()
        while stream.to_send and stream.credit and self.guest.tx.free_descriptors >= 2:
            chunk = bytes(stream.to_send[: min(stream.credit, _CHUNK)])
            del stream.to_send[: len(chunk)]
            self._send(stream, Op.RW, chunk)
            stream.sent += len(chunk)
            moved = True
        if stream.consumed - stream.told >= stream.window // 2 and self.guest.tx.free_descriptors:
            self._send(stream, Op.CREDIT_UPDATE)
        if (
            not stream.to_send
            and stream.shutdown & ~stream.shutdown_sent
            and self.guest.tx.free_descriptors
        ):
            self._send(stream, Op.SHUTDOWN, flags=stream.shutdown)
            stream.shutdown_sent = stream.shutdown
            moved = True
        return moved
