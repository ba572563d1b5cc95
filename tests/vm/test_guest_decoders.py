from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from voidbus.vm.guest import (
    exec_messages,
    file_messages,
    outcome,
    port_messages,
    pty_messages,
    telemetry_messages,
)
from voidbus.vm.guest.bodies import MAX_JSON, decode_body, encode_body
from voidbus.vm.guest.frames import (
    HEADER,
    MAX_PAYLOAD,
    Frame,
    FrameDecoder,
    ProtocolError,
    encode_frame,
    split_message,
)
from voidbus.vm.guest.handshake import (
    EVERYTHING,
    Flags,
    accepts,
    decode_ping,
    decode_pong,
    encode_ping,
    encode_pong,
)

WITH_BYTES = (
    exec_messages.decode_exec_request,
    exec_messages.decode_exec_chunk,
    exec_messages.decode_exec_response,
    file_messages.decode_write_file,
    file_messages.decode_file_content,
)
PLAIN: tuple[Callable[[bytes], object], ...] = (
    exec_messages.decode_signal,
    file_messages.decode_path,
    outcome.decode_outcome,
    file_messages.decode_file_stat,
    file_messages.decode_file_changed,
    port_messages.decode_port,
    port_messages.decode_listening,
    pty_messages.decode_pty_open,
    pty_messages.decode_pty_resize,
    pty_messages.decode_pty_closed,
    telemetry_messages.decode_subscription,
    telemetry_messages.decode_telemetry,
    decode_ping,
    decode_pong,
    split_message,
)
FIELDS = [
    "program",
    "args",
    "stdin",
    "env",
    "working_dir",
    "timeout_secs",
    "stream",
    "data",
    "seq",
    "stdout",
    "stderr",
    "exit_code",
    "error",
    "path",
    "content",
    "success",
    "exists",
    "size",
    "cols",
    "rows",
    "interval_ms",
    "seq",
    "processes",
    "system",
    "signal",
]

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from(FIELDS), values, max_size=8)
bodies = (
    st.binary(max_size=200)
    | objects.map(lambda value: json.dumps(value).encode())
    | st.tuples(objects, st.binary(max_size=20), st.integers(-3, 3)).map(
        lambda parts: (
            struct.pack("<I", max(0, len(json.dumps(parts[0])) + parts[2]))
            + json.dumps(parts[0]).encode()
            + parts[1]
        )
    )
)


@settings(max_examples=400, deadline=None)
@given(bodies, st.booleans())
def test_decoders_raise_nothing_but_protocol_errors(body: bytes, raw: bool) -> None:
    for with_bytes in WITH_BYTES:
        with contextlib.suppress(ProtocolError):
            with_bytes(body, raw=raw)
    for plain in PLAIN:
        with contextlib.suppress(ProtocolError):
            plain(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"program":' + b"[" * 100_000,
        b'{"program":"\\ud800"}',
        b'{"program":"x","timeout_secs":' + b"9" * 5000 + b"}",
        b'{"program":"x","stdin":[256]}',
        b'{"program":"x","stdin":[1,]}',
        b'{"program":"x","stdin":[,1]}',
        b'{"program":"x","stdin":[-1]}',
        b'{"program":"x","stdin":[1_0]}',
        b'{"program":"x","stdin":[1',
        b'{"program":"x","stdin":0}',
        b'{"program":"x","stdin":[1],"stdin":[2]}',
        b'{"program":"x","env":[["a"]]}',
        b'{"program":NaN}',
        b"\xff",
        b"",
    ],
)
def test_an_odd_exec_request_is_a_protocol_error(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        exec_messages.decode_exec_request(body, raw=False)


text = st.text(st.characters(codec="utf-8"), max_size=20)
requests = st.builds(
    exec_messages.ExecRequest,
    text,
    st.lists(text, max_size=3).map(tuple),
    st.binary(max_size=300),
    st.lists(st.tuples(text, text), max_size=3).map(tuple),
    st.none() | text,
    st.none() | st.integers(0, 10_000),
)


@given(requests, st.booleans())
def test_an_exec_request_comes_back_as_it_was(
    request: exec_messages.ExecRequest, raw: bool
) -> None:
    assert (
        exec_messages.decode_exec_request(
            exec_messages.encode_exec_request(request, raw=raw), raw=raw
        )
        == request
    )


@given(st.binary(max_size=300_000), st.binary(max_size=50), st.none() | text, st.booleans())
@settings(max_examples=30)
def test_an_exec_response_comes_back_as_it_was(
    out: bytes, err: bytes, error: str | None, raw: bool
) -> None:
    response = exec_messages.ExecResponse(out, err, -1, error, 5, 9, True)
    encoded = exec_messages.encode_exec_response(response, raw=raw, extended=True)
    assert exec_messages.decode_exec_response(encoded, raw=raw) == response


@given(st.dictionaries(text.filter(lambda name: name != "data"), text), st.binary(max_size=64))
def test_the_base_form_is_json_with_arrays_of_integers(values: dict[str, str], data: bytes) -> None:
    body = encode_body(values, {"data": data})
    assert json.loads(body) == {**values, "data": list(data)}
    assert decode_body(body, ("data",)) == (values, {"data": data})
    spaced = json.dumps({**values, "data": list(data)}, indent=2).encode()
    assert decode_body(spaced, ("data",)) == (values, {"data": data})


def test_text_that_looks_like_a_byte_field_stays_text() -> None:
    values = {"error": '"stdout":[1,2', "exit_code": 0, 'x"stdout': [1]}
    assert (
        exec_messages.decode_exec_response(json.dumps(values).encode(), raw=False).error
        == '"stdout":[1,2'
    )


def test_decoding_hostile_bodies_costs_little_more_than_their_size() -> None:
    size = 8 * 1024 * 1024
    tracemalloc.start()
    try:
        for filler in (b"[],", b"0,"):
            body = b'{"success":true,"content":[' + filler * (size // len(filler)) + b"0]}"
            tracemalloc.reset_peak()
            with contextlib.suppress(ProtocolError):
                file_messages.decode_file_content(body, raw=False)
            assert tracemalloc.get_traced_memory()[1] < 5 * size
        with pytest.raises(ProtocolError):
            decode_body(b'{"a":"' + b"x" * MAX_JSON + b'"}')
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"exists":false}',
        b'{"exists":true}',
        b'{"exists":true,"size":null}',
        b'{"exists":true,"size":-1}',
        b'{"exists":true,"size":1.5}',
        b'{"exists":1,"size":1}',
    ],
)
def test_a_notice_of_a_file_names_one_that_is_there_and_its_size(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        file_messages.decode_file_changed(body)
    there = file_messages.FileStat(True, 3)
    assert file_messages.decode_file_changed(file_messages.encode_file_stat(there)) == there


# -- frames -------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=50)), max_size=10),
    st.integers(1, 40),
)
def test_frames_come_out_whole_however_the_stream_is_cut(
    sent: list[tuple[int, bytes]], step: int
) -> None:
    stream = b"".join(encode_frame(kind, payload) for kind, payload in sent)
    decoder = FrameDecoder()
    got: list[Frame] = []
    for start in range(0, len(stream), step):
        got += decoder.feed(stream[start : start + step])
    assert got == [Frame(*pair) for pair in sent]
    assert decoder.buffered == 0


@given(st.binary(max_size=300), st.integers(0, 64))
def test_a_decoder_never_holds_more_than_its_limit(data: bytes, limit: int) -> None:
    decoder = FrameDecoder(limit)
    try:
        for byte in data:
            decoder.feed(bytes([byte]))
            assert decoder.buffered <= limit + HEADER.size
    except ProtocolError:
        assert decoder.buffered == 0
        with pytest.raises(ProtocolError):
            decoder.feed(b"")


def test_a_frame_of_exactly_the_cap_is_taken_and_one_byte_more_is_not() -> None:
    frames = FrameDecoder().feed(encode_frame(18, bytes(MAX_PAYLOAD)))
    assert len(frames[0].payload) == MAX_PAYLOAD
    with pytest.raises(ProtocolError):
        FrameDecoder().feed(HEADER.pack(MAX_PAYLOAD + 1, 18))
    with pytest.raises(ProtocolError):
        encode_frame(18, bytes(MAX_PAYLOAD + 1))


# -- handshake ----------------------------------------------------------------------------


def test_a_ping_is_37_bytes_and_a_pong_5() -> None:
    assert encode_ping(b"s" * 32, Flags.MULTIPLEX) == b"s" * 32 + b"\x02\0\0\0\x01"
    assert encode_pong(Flags.MULTIPLEX) == b"\x02\0\0\0\x01"
    assert decode_pong(encode_pong()).flags == EVERYTHING


def test_only_the_right_secret_with_multiplexing_is_accepted() -> None:
    secret = b"s" * 32
    assert accepts(decode_ping(encode_ping(secret)), secret)
    assert not accepts(decode_ping(encode_ping(b"t" * 32)), secret)
    assert not accepts(decode_ping(secret), secret)  # the older form, without flags
    assert not accepts(decode_ping(encode_ping(secret, Flags(0))), secret)
    assert not accepts(decode_ping(encode_ping(b"\0" * 32)), b"")
