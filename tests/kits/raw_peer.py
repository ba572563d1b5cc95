"""Peers of the guest protocol that speak it frame by frame, and may say anything."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

from machine_kit import WAIT

from voidbus.vm.channel import GuestChannel
from voidbus.vm.connect import Connected
from voidbus.vm.guest.frames import Frame, FrameDecoder, encode_message, split_message
from voidbus.vm.guest.handshake import Flags


class RawPeer:
    """One end of a stream, spoken frame by frame."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(WAIT)
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []

    def send(self, kind: int, request_id: int, body: bytes = b"") -> None:
        self.sock.sendall(encode_message(kind, request_id, body))

    def receive(self) -> Frame | None:
        """The next frame; None when the other side closed."""
        while not self._frames:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self._frames = self._decoder.feed(data)
        return self._frames.pop(0)

    def message(self) -> tuple[int, int, bytes]:
        frame = self.receive()
        assert frame is not None
        return (frame.type, *split_message(frame.payload))


def no_dial(_: float) -> Connected:
    raise AssertionError("nothing to dial")


def raw_guest(flags: Flags) -> tuple[GuestChannel, RawPeer]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return GuestChannel(Connected(ours, flags), dial=no_dial), RawPeer(theirs)


MakeChannel = Callable[[Flags], tuple[GuestChannel, RawPeer]]


@contextlib.contextmanager
def raw_guests() -> Iterator[MakeChannel]:
    """Makes channels with the guests they lead to; at the end they are closed."""
    made: list[tuple[GuestChannel, RawPeer]] = []

    def make(flags: Flags) -> tuple[GuestChannel, RawPeer]:
        made.append(raw_guest(flags))
        return made[-1]

    yield make
    for channel, peer in made:
        channel.close()
        peer.sock.close()
