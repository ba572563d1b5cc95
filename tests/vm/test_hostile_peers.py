"""Raw peers on either side: ones that know only the base protocol, and ones that lie."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_kit import WAIT, Running
from raw_peer import MakeChannel, RawPeer, raw_guest, raw_guests

from voidbus.vm.channel import ExecCall, ExecResult
from voidbus.vm.connect import connect_deadline, connect_guest
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest import exec_messages, file_messages, port_messages
from voidbus.vm.guest.agent import Agent, Settings
from voidbus.vm.guest.connection import Connection
from voidbus.vm.guest.frames import (
    GUEST_STREAM_BIT,
    HEADER,
    MessageType,
    encode_frame,
    encode_message,
)
from voidbus.vm.guest.handshake import EVERYTHING, Flags, encode_ping, encode_pong

SECRET = secrets.token_bytes(32)


@pytest.fixture
def channel_to() -> Iterator[MakeChannel]:
    with raw_guests() as make:
        yield make


# -- the host against raw guests ----------------------------------------------------------


def test_a_base_protocol_guest_gets_json_and_no_extension(channel_to: MakeChannel) -> None:
    channel, guest = channel_to(Flags.MULTIPLEX)
    running = Running(channel, ExecCall("cat", stdin=b"\x00\xff"))
    kind, number, body = guest.message()
    assert kind == MessageType.EXEC_REQUEST
    assert exec_messages.decode_exec_request(body, raw=False).stdin == b"\x00\xff"
    assert not running.handle.signal(15)
    with pytest.raises(ChannelFault, match="unsupported"):
        channel.listen_forward(1, ("127.0.0.1", 1), WAIT)
    guest.send(15, number, b'{"stream":"stdout","data":[104,105],"seq":0}')
    guest.send(
        2,
        number,
        b'{"stdout":[104,105],"stderr":[],"exit_code":0,"error":null,"duration_ms":null}',
    )
    assert running.result() == ExecResult(b"hi", b"", 0, None, None, None, False)
    assert running.chunks == [("stdout", b"hi")]


def test_answers_to_nobody_are_dropped(channel_to: MakeChannel) -> None:
    channel, guest = channel_to(EVERYTHING)
    guest.send(MessageType.EXEC_RESPONSE, 77, b"not even a body")
    running = Running(channel, ExecCall("true"))
    _, number, _ = guest.message()
    response = exec_messages.ExecResponse(b"", b"", 0)
    encoded = exec_messages.encode_exec_response(response, raw=True, extended=True)
    guest.send(MessageType.EXEC_RESPONSE, number, encoded)
    assert running.result().exit_code == 0
    assert channel.dropped == 1


@pytest.mark.parametrize(
    "answer",
    [
        encode_frame(99, b"\0\0\0\0"),
        HEADER.pack(2**32 - 1, 2),
        encode_message(MessageType.EXEC_RESPONSE, 1, b"garbage"),
        encode_message(MessageType.WRITE_FILE_RESPONSE, 1, b'{"success":true}'),
        encode_message(MessageType.FORWARD_OPEN, GUEST_STREAM_BIT | 1, b'{"port":22}'),
        encode_frame(2, b"\1"),
    ],
)
def test_a_guest_that_breaks_the_protocol_ends_its_calls_with_a_fault(
    channel_to: MakeChannel, answer: bytes
) -> None:
    channel, guest = channel_to(EVERYTHING)
    running = Running(channel, ExecCall("true"))
    guest.message()
    guest.sock.sendall(answer)
    ending = running.ending()
    assert isinstance(ending, ChannelFault)
    assert ending.reason == FaultReason.PROTOCOL
    with pytest.raises(ChannelFault):
        channel.ping(WAIT)


def test_a_silent_guest_ends_a_call_by_its_deadline(channel_to: MakeChannel) -> None:
    channel, _ = channel_to(EVERYTHING)
    with pytest.raises(ChannelFault) as caught:
        channel.ping(0.05)
    assert caught.value.reason == FaultReason.DEADLINE


def test_a_guest_that_takes_nothing_is_told_apart_by_overload(channel_to: MakeChannel) -> None:
    channel, _ = channel_to(EVERYTHING)
    endings: list[ExecResult | ChannelFault] = []
    for _ in range(4):
        call = ExecCall("cat", stdin=bytes(60 * 1024 * 1024))
        channel.exec(call, lambda *_: None, endings.append)
    assert [fault.reason for fault in endings if isinstance(fault, ChannelFault)] == [
        FaultReason.OVERLOADED
    ] * 2


def test_a_guest_can_reach_only_endpoints_that_were_named(channel_to: MakeChannel) -> None:
    channel, guest = channel_to(EVERYTHING)
    ports: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(
            target=lambda: ports.append(channel.listen_forward(80, server.getsockname()[:2], WAIT))
        )
        thread.start()
        _, number, _ = guest.message()
        listening = port_messages.encode_listening(port_messages.Listening(80))
        guest.send(MessageType.FORWARD_LISTENING, number, listening)
        thread.join(WAIT)
        assert ports == [80]
        stream = GUEST_STREAM_BIT | 1
        guest.send(MessageType.FORWARD_OPEN, stream, port_messages.encode_port(22))
        assert guest.message() == (MessageType.FORWARD_CLOSE, stream, b"\x01")
        # More than the window is not kept: the stream ends.
        stream += 1
        guest.send(MessageType.FORWARD_OPEN, stream, port_messages.encode_port(80))
        for _ in range(400):
            guest.send(MessageType.FORWARD_DATA, stream, bytes(65536))
        while (answer := guest.message())[0] == MessageType.FORWARD_WINDOW:
            pass
        assert answer == (MessageType.FORWARD_CLOSE, stream, b"\x01")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.tuples(st.integers(0, 40), st.integers(0, 3), st.binary(max_size=40)).map(
            lambda parts: encode_message(*parts)
        ),
        max_size=6,
    )
)
def test_whatever_a_guest_sends_every_call_ends_once(sent: list[bytes]) -> None:
    channel, guest = raw_guest(EVERYTHING)
    try:
        runs = [Running(channel, ExecCall("true")) for _ in range(2)]
        with contextlib.suppress(ConnectionError):
            guest.sock.sendall(b"".join(sent))
        guest.sock.close()
        for running in runs:
            running.ending()
    finally:
        channel.close()


# -- the handshake ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        encode_frame(MessageType.PONG, encode_pong(Flags(0))),
        encode_frame(MessageType.PONG, b"\x02"),
        encode_frame(MessageType.EXEC_RESPONSE, b"12345"),
        HEADER.pack(2**31, MessageType.PONG),
        encode_frame(MessageType.PONG, encode_pong()) * 2,
    ],
)
def test_a_guest_without_a_proper_pong_is_tried_again_until_time_is_up(answer: bytes) -> None:
    tries: list[socket.socket] = []

    def dial() -> socket.socket:
        ours, theirs = socket.socketpair()
        theirs.sendall(answer)
        tries.append(theirs)
        return ours

    with pytest.raises(ChannelFault) as caught:
        connect_guest(dial, SECRET, 0.2)
    assert caught.value.reason == FaultReason.DEADLINE
    assert len(tries) > 1
    for sock in tries:
        sock.close()


def test_the_connect_deadline_stays_within_its_range() -> None:
    name = "VOID_BOX_CONNECT_DEADLINE_SECS"
    assert connect_deadline({}) == 30
    assert connect_deadline({name: "5"}) == 30
    assert connect_deadline({name: "99999"}) == 3600
    assert connect_deadline({name: "60"}) == 60
    assert connect_deadline({name: "soon"}) == 30


# -- the agent against raw hosts ----------------------------------------------------------


class RawHost:
    """A connection served by the agent's code in this process."""

    def __init__(self, root: Path) -> None:
        self.logged: list[str] = []
        self.closed = False
        self.agent = Agent(Settings(SECRET, str(root)), self.logged.append)
        self.agent.place.prepare()
        ours, theirs = socket.socketpair()
        self.peer = RawPeer(ours)
        self.connection = Connection(theirs, self.agent)
        self.thread = threading.Thread(target=self.connection.run)
        self.thread.start()

    def authenticate(self, flags: Flags) -> None:
        self.peer.sock.sendall(encode_frame(MessageType.PING, encode_ping(SECRET, flags)))
        pong = self.peer.receive()
        assert pong is not None
        assert pong.type == MessageType.PONG

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self.peer.sock.close()
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        self.agent.release()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[RawHost]:
    raw = RawHost(tmp_path)
    yield raw
    raw.close()


def test_a_base_protocol_host_is_served_in_order_and_in_json(host: RawHost) -> None:
    host.authenticate(Flags.MULTIPLEX)
    request = b'{"program":"sh","args":["-c","echo hi >f; cat f; exit 3"]}'
    host.peer.send(MessageType.EXEC_REQUEST, 1, request)
    host.peer.send(MessageType.READ_FILE, 2, b'{"path":"/workspace/f"}')
    kind, number, body = host.peer.message()
    assert (kind, number) == (MessageType.EXEC_OUTPUT_CHUNK, 1)
    assert body == b'{"stream":"stdout","seq":0,"data":[104,105,10]}'
    kind, number, body = host.peer.message()
    assert (kind, number) == (MessageType.EXEC_RESPONSE, 1)
    response = exec_messages.decode_exec_response(body, raw=False)
    assert (response.stdout, response.exit_code) == (b"hi\n", 3)
    assert b"truncated" not in body
    kind, number, body = host.peer.message()
    assert (kind, number) == (MessageType.READ_FILE_RESPONSE, 2)
    assert file_messages.decode_file_content(body, raw=False).content == b"hi\n"


def test_an_unknown_frame_type_is_skipped_by_the_guest(host: RawHost) -> None:
    host.authenticate(EVERYTHING)
    host.peer.send(200, 1, b"")
    host.peer.send(MessageType.SNAPSHOT_READY, 5)
    assert host.peer.message() == (MessageType.SNAPSHOT_READY, 5, b"")


@pytest.mark.parametrize(
    "first",
    [
        encode_message(MessageType.EXEC_REQUEST, 1, b'{"program":"true"}'),
        encode_frame(MessageType.PING, encode_ping(b"x" * 32)),
        encode_frame(MessageType.PING, SECRET),
        encode_frame(MessageType.PING, b""),
        HEADER.pack(1_000_000, MessageType.PING),
    ],
    ids=["request", "wrong secret", "no version", "nothing", "endless frame"],
)
def test_a_peer_that_does_not_authenticate_gets_a_closed_connection(
    host: RawHost, first: bytes
) -> None:
    host.peer.sock.sendall(first)
    assert host.peer.receive() is None


def test_a_host_that_leaves_takes_its_programs_with_it(host: RawHost) -> None:
    host.authenticate(Flags.MULTIPLEX)
    script = "echo $$; exec sleep 73"
    request = exec_messages.encode_exec_request(
        exec_messages.ExecRequest("sh", ("-c", script)), raw=False
    )
    host.peer.send(MessageType.EXEC_REQUEST, 1, request)
    chunk = exec_messages.decode_exec_chunk(host.peer.message()[2], raw=False)
    pid = int(chunk.data)
    host.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.tuples(
            st.integers(0, 40).filter(lambda kind: kind not in (1, 22)),
            st.integers(0, 3),
            st.binary(max_size=40) | st.sampled_from([b'{"path":"/workspace/x"}', b"{}"]),
        ).map(lambda parts: encode_message(*parts)),
        max_size=6,
    ),
    st.booleans(),
)
def test_whatever_a_host_sends_its_connection_ends_and_nothing_else(
    tmp_path: Path, sent: list[bytes], authenticated: bool
) -> None:
    raw = RawHost(tmp_path)
    try:
        if authenticated:
            raw.authenticate(EVERYTHING)
        with contextlib.suppress(ConnectionError):
            raw.peer.sock.sendall(b"".join(sent) + struct.pack("<I", 3))
    finally:
        raw.close()
