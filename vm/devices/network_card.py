"""The network card (virtio 1.2, section 5.1): Ethernet frames between a guest and a stream socket,
each after its length there, as `vm/network/frame_port.py` has it."""

from __future__ import annotations

import collections
import socket
import struct
from typing import ClassVar

from voidbus.vm.devices.device import RING_FEATURES, VirtioDevice
from voidbus.vm.devices.event_loop import READ, WRITE, EventLoop
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.virtqueue import Chain, Virtqueue
from voidbus.vm.network.addresses import MAX_FRAME
from voidbus.vm.network.frame_port import BACKLOG, PIECE, FrameError, FramePort, framed

RX, TX = 0, 1
"""The queues (5.1.2)."""

# Feature bits (5.1.3).
F_MTU, F_MAC, F_MRG_RXBUF = 1 << 3, 1 << 5, 1 << 15

_QUEUE_SIZE = 256
_HEADER_BYTES = 12
"""struct virtio_net_hdr of virtio 1 (5.1.6); all zeros but for the number of buffers, its last
16 bits, since nothing is offloaded."""
_FRAMES_A_TURN = 64


class NetworkCard(VirtioDevice):
    """One card on a connected stream socket. The guest's frames wait in its queue while the other
    end takes none, and the other end's in the socket while the guest has no buffers; so at most
    one read of either waits here. When the other end has gone, the card is there and carries
    nothing."""

    device_id: ClassVar[int] = 1

    def __init__(self, sock: socket.socket, mac: str, mtu: int) -> None:
        """``sock`` is owned from now on; ``mac`` is six bytes in hexadecimal, with colons."""
        self.queue_sizes = (_QUEUE_SIZE, _QUEUE_SIZE)
        self.features = RING_FEATURES | F_MAC | F_MTU | F_MRG_RXBUF
        address = bytes.fromhex(mac.replace(":", ""))
        # No status and one pair of queues, which features that are not offered would tell.
        self._config = struct.pack("<6sHHH", address, 0, 0, mtu)
        self._port = FramePort(sock)
        self._rx: Virtqueue | None = None
        self._tx: Virtqueue | None = None
        self._mergeable = False
        self._arrived: collections.deque[bytes] = collections.deque()
        """Frames that wait for buffers of the guest."""
        self._gone = False
        self._watched = 0
        self._later = False
        self._delivers_later = False

    # -- the transport's ------------------------------------------------------------------

    def attach(self, loop: EventLoop) -> None:
        self._loop = loop

    def config(self) -> bytes:
        return self._config

    def negotiated(self, features: int) -> None:
        self._mergeable = bool(features & F_MRG_RXBUF)

    def queue_started(self, index: int, queue: Virtqueue) -> None:
        if index == RX:
            self._rx = queue
        else:
            self._tx = queue

    def queue_stopped(self, index: int) -> None:
        if index == RX:
            self._rx = None
        else:
            self._tx = None
        self._watch()

    def queue_notified(self, index: int) -> None:
        if index == RX:
            self._deliver()
        else:
            self._send()
        self._watch()

    def reset(self) -> None:
        self._arrived.clear()
        self._mergeable = False

    def close(self) -> None:
        self._gone = True
        self._watch()
        self._port.close()

    # -- from the guest -------------------------------------------------------------------

    def _send(self) -> None:
        """Take the guest's frames as long as there is room for them."""
        queue = self._tx
        if queue is None:
            return
        queue.disable_notifications()
        piece = bytearray()
        held = False
        for _ in range(_FRAMES_A_TURN):
            if self._port.waiting > BACKLOG and not self._gone:
                held = True  # the flush that makes room goes on
                break
            chain = queue.pop()
            if chain is None:
                if queue.enable_notifications():
                    self._send_later()
                break
            frame = self._frame(chain)
            queue.push(chain, 0)
            if self._gone:
                continue
            if piece and len(piece) + len(frame) > PIECE:
                self._port.send(bytes(piece))
                piece.clear()
            piece += frame
        else:
            self._send_later()
        if piece:
            self._port.send(bytes(piece))
        queue.notify()
        self._flush()
        if held and self._port.waiting <= BACKLOG:
            self._send_later()  # that flush was this one

    def _frame(self, chain: Chain) -> bytes:
        """A frame of the guest behind its length; nothing for what is none."""
        size = chain.readable_bytes - _HEADER_BYTES
        return framed(chain.read(size, _HEADER_BYTES)) if 0 < size <= MAX_FRAME else b""

    def _send_later(self) -> None:
        if not self._later:
            self._later = True
            self._loop.soon(self._go_on)

    def _go_on(self) -> None:
        self._later = False
        self._send()
        self._watch()

    def _flush(self) -> None:
        if not self._gone and not self._port.flush():
            self._lose()

    def _lose(self) -> None:
        """The other end has gone: what the guest still sends is taken and dropped."""
        self._gone = True
        self._send_later()

    # -- to the guest ---------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            if not self._port.receive():
                self._lose()
                return
            self._arrived += (
                bytes(self._port.buffer[start:end]) for start, end in self._port.frames()
            )
        except FrameError as error:
            raise DeviceError(f"the network: {error}") from error
        self._deliver()

    def _deliver(self) -> None:
        """Give the guest what has arrived, as far as it has buffers."""
        queue = self._rx
        if queue is None:
            return
        while self._arrived and self._put(queue, self._arrived[0]):
            self._arrived.popleft()
        queue.notify()

    def _deliver_later(self) -> None:
        if not self._delivers_later:
            self._delivers_later = True
            self._loop.soon(self._deliver_on)

    def _deliver_on(self) -> None:
        self._delivers_later = False
        self._deliver()
        self._watch()

    def _put(self, queue: Virtqueue, frame: bytes) -> bool:
        """Put a frame into buffers, or drop one that fits none; False: there are too few."""
        needed = _HEADER_BYTES + len(frame)
        chains: list[Chain] = []
        room = 0
        while room < needed:
            chain = queue.pop()
            if chain is None:
                # Looked for once more, later: a guest that gives and takes could keep us here.
                if queue.enable_notifications():
                    self._deliver_later()
                queue.unpop(len(chains))
                return False
            if chain.writable_bytes < _HEADER_BYTES:
                raise DeviceError(f"a receive buffer of {chain.writable_bytes} bytes")
            chains.append(chain)
            room += chain.writable_bytes
            if not self._mergeable and room < needed:
                queue.unpop(len(chains))
                return True
        message = struct.pack("<10xH", len(chains)) + frame
        for chain in chains:
            written = chain.write(message)
            queue.push(chain, written)
            message = message[written:]
        return True

    # -- the socket -----------------------------------------------------------------------

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
            self._send()
        if events & ~WRITE and not self._arrived:
            self._receive()
        self._watch()

    def _watch(self) -> None:
        """Wait for what there is room for."""
        wanted = 0
        if not self._gone:
            wanted |= READ if self._rx is not None and not self._arrived else 0
            wanted |= WRITE if self._port.waiting else 0
        if wanted == self._watched:
            return
        fd = self._port.socket.fileno()
        if not wanted:
            self._loop.unwatch(fd)
        elif not self._watched:
            self._loop.watch(fd, wanted, self._ready)
        else:
            self._loop.change(fd, wanted)
        self._watched = wanted
