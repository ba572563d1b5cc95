"""Frames on a stream socket, each after its length."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.network.addresses import MAX_FRAME
from voidbus.vm.network.frame_filter import FrameFilter
from voidbus.vm.network.frame_port import BACKLOG, BUFFER, PIECE, FrameError, FramePort, framed
from voidbus.vm.network.relay import Relay
from voidbus.vm.network.rules import NetworkRules


@pytest.fixture
def pair() -> Iterator[tuple[FramePort, socket.socket]]:
    ours, theirs = socket.socketpair()
    port = FramePort(ours)
    theirs.settimeout(10)
    yield port, theirs
    port.close()
    theirs.close()


def received(port: FramePort) -> list[bytes]:
    return [bytes(port.buffer[start:end]) for start, end in port.frames()]


@given(st.lists(st.binary(max_size=80), max_size=8), st.lists(st.integers(1, 60), max_size=20))
def test_frames_arrive_whole_however_the_stream_is_cut(
    frames: list[bytes], cuts: list[int]
) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        port = FramePort(ours)
        stream = b"".join(framed(frame) for frame in frames)
        got: list[bytes] = []
        for cut in [*cuts, len(stream)]:
            theirs.sendall(stream[:cut])
            stream = stream[cut:]
            assert port.receive()
            got += received(port)
        port.close()
    assert got == frames


def test_the_longest_frame_is_taken_and_a_longer_one_is_an_error(
    pair: tuple[FramePort, socket.socket],
) -> None:
    port, other = pair
    other.sendall(framed(bytes(MAX_FRAME)))
    got: list[bytes] = []
    while not got:
        assert port.receive()
        got = received(port)
    assert got == [bytes(MAX_FRAME)]
    other.sendall(struct.pack(">I", MAX_FRAME + 1))
    assert port.receive()
    with pytest.raises(FrameError, match=f"a frame of {MAX_FRAME + 1} bytes"):
        received(port)


def test_half_a_frame_is_waited_for_and_then_the_end_is_told(
    pair: tuple[FramePort, socket.socket],
) -> None:
    port, other = pair
    other.sendall(framed(b"whole") + framed(b"half of it")[:7])
    assert port.receive()
    assert received(port) == [b"whole"]
    assert received(port) == []
    other.close()
    assert not port.receive()


def test_nothing_to_receive_is_no_end(pair: tuple[FramePort, socket.socket]) -> None:
    assert pair[0].receive()


def test_what_can_not_be_sent_waits_in_order(pair: tuple[FramePort, socket.socket]) -> None:
    port, other = pair
    frames = [framed(bytes([number % 256]) * 30000) for number in range(100)]
    for frame in frames:
        port.send(frame)
    assert port.flush()
    assert 0 < port.waiting < sum(map(len, frames))
    got = bytearray()
    while len(got) < sum(map(len, frames)):
        got += other.recv(100_000)
        assert port.flush()
    assert bytes(got) == b"".join(frames)
    assert port.waiting == 0
    other.close()
    port.send(frames[0])
    assert not port.flush()


def test_a_piece_is_sent_whole_or_not_at_all(pair: tuple[FramePort, socket.socket]) -> None:
    """passt relies on it; a kernel that cuts pieces would be seen here."""
    port, other = pair
    for _ in range(100):
        port.send(bytes(PIECE))
    assert port.flush()
    assert port.waiting > 0
    assert port.waiting % PIECE == 0
    other.setblocking(False)
    got = 0
    while True:
        try:
            got += len(other.recv(10 * BUFFER))
        except BlockingIOError:
            break
    assert got > 0
    assert got % PIECE == 0


def test_pieces_are_whole_frames_and_no_longer_than_a_piece() -> None:
    guest_end, guest = socket.socketpair()
    passt_end, passt = socket.socketpair()
    with guest, passt:
        guest_port, passt_port = FramePort(guest_end), FramePort(passt_end)
        relay = Relay(guest_port, passt_port, FrameFilter(NetworkRules(), lambda _: False))
        stream = b"".join(framed(bytes(size)) for size in (9000, 31000, 1, 0, 40000, 50000, 20))
        passt.settimeout(10)
        passt.sendall(stream)
        while relay.received_frames < 7:
            assert relay.from_passt()
        pieces = list(guest_port._pieces)
        guest_port.close()
        passt_port.close()
    assert b"".join(pieces) == stream
    assert relay.received_bytes == len(stream) - 7 * 4
    for piece in pieces:
        (first,) = struct.unpack_from(">I", piece)
        assert len(piece) <= PIECE or len(piece) == first + 4


def test_answers_nobody_takes_are_dropped_and_reading_stops() -> None:
    guest_end, guest = socket.socketpair()
    passt_end, passt = socket.socketpair()
    with guest, passt:
        guest_port, passt_port = FramePort(guest_end), FramePort(passt_end)
        relay = Relay(guest_port, passt_port, FrameFilter(NetworkRules(), lambda _: False))
        for _ in range(BACKLOG // 1000 + 500):
            relay._stop(bytes(1000))
        assert guest_port.waiting <= BACKLOG + 1004
        assert not relay.reads_passt
        assert relay.reads_guest
        guest_port.close()
        passt_port.close()
