"""A guest that plays with the streams of its forwards: only the streams it touches may suffer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from voidbus.vm.guest.forward import MAX_STREAMS, StreamPump
from voidbus.vm.guest.frames import GUEST_STREAM_BIT, MessageType

WAIT = 20.0
FIRST, SECOND, HELD = (GUEST_STREAM_BIT | number for number in (1, 2, 3))


class HeldPump:
    """A pump whose thread can be held in ``send``, so that what happens meanwhile is one turn."""

    def __init__(self) -> None:
        self.sent: list[tuple[MessageType, int, bytes]] = []
        self.news = threading.Condition()
        self.held, self.go_on = threading.Event(), threading.Event()
        self.pump = StreamPump(self._send, "pump")

    def _send(self, kind: MessageType, number: int, body: bytes) -> None:
        with self.news:
            self.sent.append((kind, number, body))
            self.news.notify_all()
        if number == HELD:
            self.held.set()
            self.go_on.wait(WAIT)

    def attach(self, number: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.pump.attach(number, theirs)
        return ours

    def hold(self) -> socket.socket:
        end = self.attach(HELD)
        end.send(b"x")
        assert self.held.wait(WAIT)
        return end

    def wait_for(self, kind: MessageType, number: int) -> None:
        def come() -> bool:
            return any(one[:2] == (kind, number) for one in self.sent)

        with self.news:
            assert self.news.wait_for(come, WAIT), f"no {kind.name}; the pump has ended"


@pytest.fixture
def held() -> Iterator[HeldPump]:
    made = HeldPump()
    yield made
    made.go_on.set()
    made.pump.close()


def still_serves(held: HeldPump) -> None:
    with held.attach(SECOND) as end:
        end.send(b"still there")
        held.wait_for(MessageType.FORWARD_DATA, SECOND)


def test_a_stream_ended_in_the_turn_in_which_its_socket_takes_data_ends_alone(
    held: HeldPump,
) -> None:
    with held.attach(FIRST) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        held.pump.handle(MessageType.FORWARD_DATA, FIRST, bytes(256 * 1024))
        held.wait_for(MessageType.FORWARD_WINDOW, FIRST)  # some was taken, the rest waits
        with held.hold():
            held.pump.handle(MessageType.FORWARD_CLOSE, FIRST, b"\x01")
            reader.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while reader.recv(1 << 20):
                    pass
            held.go_on.set()
            still_serves(held)


def test_a_number_given_again_in_the_turn_in_which_its_socket_has_data_is_the_new_stream(
    held: HeldPump,
) -> None:
    with held.attach(FIRST) as before, held.hold():
        held.pump.handle(MessageType.FORWARD_CLOSE, FIRST, b"\x01")
        after = held.attach(FIRST)
        before.send(b"for nobody")
        held.go_on.set()
        with after:
            still_serves(held)
            after.send(b"of the new one")
            held.wait_for(MessageType.FORWARD_DATA, FIRST)


def test_a_pump_is_full_before_its_thread_has_seen_the_streams(held: HeldPump) -> None:
    with held.hold():
        before = held.pump.full
        ends = [held.attach(GUEST_STREAM_BIT | 100 + n) for n in range(MAX_STREAMS - 1)]
        assert (before, held.pump.full) == (False, True)
        for end in ends:
            end.close()
