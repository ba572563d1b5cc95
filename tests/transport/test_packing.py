"""Messages that leave together travel as one, and arrive as they were; whatever else comes is
refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from raw_dealer import RawDealer, look
from transport_kit import Bus, Echo, Look

from voidbus.transport.envelope import BODY_LIMIT, Envelope, FrameError, Kind, read_envelope
from voidbus.transport.fault import FaultReason
from voidbus.transport.link import Link
from voidbus.transport.message import Right
from voidbus.transport.packing import PACK_LIMIT, is_pack, pack, packets, unpack


def tell(number: int, size: int = 0, attachments: tuple[bytes, ...] = ()) -> Envelope:
    return Envelope(
        *(Kind.TELL, "hub/x", "a/"),
        sequence=number,
        tag="t",
        body=b"x" * size,
        attachments=attachments,
    )


def refuse(envelope: Envelope, detail: str) -> None:
    raise AssertionError(detail)


def written(envelopes: list[Envelope], *, packed: bool = True) -> list[list[bytes]]:
    return [list(f) for f, _ in packets(envelopes, packed=packed, on_refused=refuse)]


def opened(frames: list[bytes]) -> list[list[bytes]]:
    """The envelopes of a message."""
    return unpack(frames) if is_pack(frames) else [frames]


sizes = st.integers(0, 6000) | st.sampled_from([3900, 4096, 40_000])


@given(st.lists(st.tuples(sizes, st.lists(st.binary(max_size=9), max_size=2)), max_size=40))
def test_what_is_packed_arrives_whole_and_in_its_order(
    made: list[tuple[int, list[bytes]]],
) -> None:
    envelopes = [tell(n, size, tuple(others)) for n, (size, others) in enumerate(made)]
    messages = written(envelopes)
    read = [read_envelope(parts) for message in messages for parts in opened(message)]
    assert [(e.sequence, e.body, tuple(e.attachments)) for e in read] == [
        (e.sequence, e.body, e.attachments) for e in envelopes
    ]
    assert all(len(m) > 1 or len(m[0]) <= PACK_LIMIT or not is_pack(m) for m in messages)


def test_a_message_that_leaves_alone_is_not_packed() -> None:
    assert written([tell(1)]) == [tell(1).frames()]


def test_nothing_is_packed_for_a_node_that_reads_no_packs() -> None:
    assert written([tell(1), tell(2)], packed=False) == [tell(1).frames(), tell(2).frames()]


def test_what_cannot_be_written_is_told_and_the_others_leave() -> None:
    told: list[int] = []
    envelopes = [tell(1), tell(2, BODY_LIMIT + 1), tell(3)]
    found = list(
        packets(envelopes, packed=True, on_refused=lambda e, detail: told.append(e.sequence))
    )
    assert told == [2]
    assert [[e.sequence for e in sent] for _, sent in found] == [[1, 3]]


@given(
    st.lists(st.binary(max_size=60), max_size=4)
    | st.binary(max_size=60).map(lambda rest: [b"\xff" + rest])
    | st.binary(max_size=9).map(lambda rest: [pack([b"one", b"two"])[0] + rest])
)
def test_whatever_comes_is_unpacked_or_refused(frames: list[bytes]) -> None:
    with contextlib.suppress(FrameError):
        for parts in opened(frames):
            assert isinstance(parts, list)


@pytest.mark.parametrize(
    "frames",
    [
        [b"\xff\0\0\0"],
        [b"\xff\0\0\0\0"],
        [b"\xff\0\0\0\x05abcd"],
        [b"\xff\0\0\0\x01a", b"attachment"],
        [b"\xff" + b"\0\0\0\x01a" * 7000],
    ],
    ids=["cut length", "nothing", "cut envelope", "two frames", "over the limit"],
)
def test_a_pack_that_is_none_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(FrameError):
        unpack(frames)


def test_each_envelope_of_a_pack_is_looked_at_by_itself(bus: Bus) -> None:
    echo = Echo()
    bus.hub.attach("x", echo)
    peer = RawDealer(bus, Right.OPERATE)
    try:
        assert peer.hello("client-raw", 7) is Kind.WELCOME
        first, second = (look(Kind.ASK, "client-raw/", "hub/x", 7, n).frames()[0] for n in (1, 2))
        peer.socket.send_multipart(pack([first, b"damaged", second, first]))
        assert [peer.receive().sequence for _ in range(2)] == [1, 2]
    finally:
        peer.socket.close()
    assert len(echo.got) == 2
    assert bus.hub.counters["malformed"] == 1
    assert bus.hub.counters["replayed"] == 1


def test_packs_of_one_link_leave_the_others_their_turn(ipc_bus: Bus) -> None:
    echo = Echo()
    ipc_bus.hub.attach("x", echo)
    peer, leaf = RawDealer(ipc_bus, Right.OPERATE), ipc_bus.leaf("run-1", Right.WORK)
    assert leaf.wait_up(5)
    bursts: list[int] = []
    drain = ipc_bus.hub._loop._drain

    def counted(socket: zmq.Socket[bytes]) -> None:
        before = len(echo.got) + len(ipc_bus.hub._loop._deferred)
        drain(socket)
        bursts.append(len(echo.got) + len(ipc_bus.hub._loop._deferred) - before)

    ipc_bus.hub._loop._drain = counted  # type: ignore[method-assign]
    try:
        assert peer.hello("client-raw", 7) is Kind.WELCOME
        each = 300
        asks = [
            look(Kind.ASK, "client-raw/", "hub/x", 7, n).frames()[0] for n in range(1, 1 + 9 * each)
        ]
        for start in range(0, len(asks), each):
            peer.socket.send_multipart(pack(asks[start : start + each]))
        echo.wait_for(len(asks))
    finally:
        peer.socket.close()
    assert max(bursts) == each, "one pack has more than a burst"


def test_messages_that_wait_for_one_node_leave_together(ipc_bus: Bus) -> None:
    echo = Echo()
    ipc_bus.hub.attach("x", echo)
    leaf = ipc_bus.leaf("client-a")
    assert leaf.wait_up(5)
    sent: list[int] = []
    send = leaf._send_frames

    def counted(frames: Sequence[bytes]) -> tuple[FaultReason, str] | None:
        sent.append(len(opened(list(frames))))
        return send(frames)

    leaf._send_frames = counted  # type: ignore[method-assign]
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(20.0)

    leaf._loop.call(hold)
    assert held.wait(20.0)
    for number in range(50):
        leaf.tell("hub/x", Look(text=str(number)))
    go.set()
    got = echo.wait_for(50)
    assert [d.message for d in got] == [Look(text=str(number)) for number in range(50)]
    assert sent == [50]


def test_a_fault_of_ours_in_one_envelope_leaves_the_others(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = Echo()
    bus.hub.attach("x", echo)
    take = bus.hub._take_message

    def broken(link: Link, envelope: Envelope) -> None:
        if envelope.sequence == 1:
            raise RuntimeError("ours")
        take(link, envelope)

    monkeypatch.setattr(bus.hub, "_take_message", broken)
    peer = RawDealer(bus, Right.OPERATE)
    try:
        assert peer.hello("client-raw", 7) is Kind.WELCOME
        asks = [look(Kind.ASK, "client-raw/", "hub/x", 7, n).frames()[0] for n in (1, 2)]
        peer.socket.send_multipart(pack(asks))
        assert peer.receive().sequence == 2
    finally:
        peer.socket.close()
    assert bus.hub.counters["frames_raised"] == 1
