"""Messages out of bytes, however they are cut: lines and headers on stdio, requests on HTTP."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.mcp.framing import MAX_HEADER_BYTES, Frame, FrameDecoder, Unreadable, wrap
from voidbus.mcp.http_wire import HttpFault, HttpRequest, RequestDecoder, response
from voidbus.mcp.local_only import check_local

LIMIT = 200


def frames(data: bytes, cuts: list[int] | None = None) -> list[Frame | Unreadable]:
    decoder = FrameDecoder(LIMIT)
    found: list[Frame | Unreadable] = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts or ()), len(data)]
    for start, end in itertools.pairwise(edges):
        found += decoder.feed(data[start:end])
    return found + decoder.end()


_texts = st.dictionaries(st.text(max_size=5), st.text(max_size=10), max_size=3).map(
    lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
)
_cuts = st.lists(st.integers(0, 5000), max_size=12)


@given(st.lists(st.tuples(_texts, st.booleans()), max_size=8), _cuts)
def test_what_is_framed_is_read_in_either_form_however_it_is_cut(
    sent: list[tuple[bytes, bool]], cuts: list[int]
) -> None:
    stream = b"".join(wrap(data, has_header=has_header) for data, has_header in sent)
    expected = [
        Frame(data, has_header)
        if len(data) <= LIMIT
        else Unreadable(f"a message is over {LIMIT} bytes", has_header)
        for data, has_header in sent
    ]
    assert frames(stream, cuts) == expected


_pieces = st.lists(
    st.binary(max_size=30)
    | st.sampled_from([b"\n", b"\r\n\r\n", b"Content-Length: 5\r\n\r\n", b"content-length:",
                       b"{}\n", b"Content-Length: 999999999999\n\n", b"x" * 300,
                       b"Content-Type: a\r\n" * 300])
).map(b"".join)  # fmt: skip


@given(_pieces, _cuts)
def test_whatever_arrives_is_the_same_however_it_is_cut_and_never_held_unbounded(
    data: bytes, cuts: list[int]
) -> None:
    decoder = FrameDecoder(LIMIT)
    decoder.feed(data)
    assert len(decoder._buffer) <= LIMIT + MAX_HEADER_BYTES
    assert frames(data, cuts) == frames(data)


@pytest.mark.parametrize(
    "data",
    [
        b'{"a":1}\n',
        b'\n\r\n  {"a":1}\r\n',
        b'{"a":1}',
        b'Content-Length: 7\r\n\r\n{"a":1}',
        b'content-length:7\n\n{"a":1}',
        b'Content-Type: application/json\r\nCONTENT-LENGTH: 7\r\n\r\n{"a":1}',
    ],
)
def test_clients_frame_in_many_ways(data: bytes) -> None:
    (frame,) = frames(data)
    assert isinstance(frame, Frame)
    assert frame.data == b'{"a":1}'
    assert frame.has_header == (b"ength" in data.lower())


def test_after_what_can_not_be_read_the_next_message_is() -> None:
    for bad in (
        b"x" * 500 + b"\n",
        b"Content-Length: 500\r\n\r\n" + b"x" * 500,
        b"Content-Type: a\r\n\r\n",
        b"Content-Length: x\r\n\r\n",
        b"Content-Length: " + b"1" * 5000 + b"\r\n\n",
    ):
        first, *_, last = frames(bad + b"{}\n")
        assert isinstance(first, Unreadable)
        assert last == Frame(b"{}", has_header=False)


# HTTP


def requests(data: bytes, cuts: list[int] | None = None) -> tuple[list[HttpRequest], int]:
    """What is read, and the status of the refusal that ends it (0: none)."""
    decoder = RequestDecoder(LIMIT)
    found = []
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts or ()), len(data)]
    try:
        for start, end in itertools.pairwise(edges):
            decoder.feed(data[start:end])
            while (one := decoder.next()) is not None:
                found.append(one)
    except HttpFault as fault:
        return found, fault.status
    return found, 0


def _sent(body: bytes, sizes: list[int] | None) -> bytes:
    head = b"POST /mcp HTTP/1.1\r\nHost: a\r\n"
    if sizes is None:
        return head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    chunks, rest = b"", body
    for size in [*sizes, len(body)]:
        piece, rest = rest[:size], rest[size:]
        if piece:
            chunks += b"%x;e=1\r\n%s\r\n" % (len(piece), piece)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nT: x\r\n\r\n"


_bodies = st.tuples(st.binary(max_size=LIMIT), st.none() | st.lists(st.integers(1, 50), max_size=5))


@given(st.lists(_bodies, max_size=4), _cuts)
def test_requests_are_read_whole_however_they_are_cut(
    sent: list[tuple[bytes, list[int] | None]], cuts: list[int]
) -> None:
    found, status = requests(b"".join(_sent(*one) for one in sent), cuts)
    assert status == 0
    assert [one.body for one in found] == [body for body, _ in sent]


@given(st.binary(max_size=300) | _pieces, _cuts)
def test_bytes_that_are_no_request_are_refused_or_waited_on(data: bytes, cuts: list[int]) -> None:
    head = b"POST /mcp HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    for start in (b"", b"POST ", head):
        _, status = requests(start + data, cuts)
        assert status in (0, 400, 413, 417, 431, 501, 505)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /mcp", 400),
        (b"GET  /mcp HTTP/1.1", 400),
        (b"G\0T /mcp HTTP/1.1", 400),
        (b"GET /mcp HTTP/2", 505),
        (b"GET /mcp HTTP/1.1", 400),  # no Host
        (b"GET /mcp HTTP/1.1\r\nHost : a", 400),
        (b"GET /mcp HTTP/1.1\r\nHost: a\r\n folded", 400),
        (b"GET /mcp HTTP/1.1\r\nHost: a\nX: b", 400),
        (b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: +5", 400),
        (b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6", 400),
        (b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", 400),
        (b"POST /mcp HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked", 501),
        (b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: 201", 413),
        (b"POST /mcp HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000, 413),
        (b"POST /mcp HTTP/1.1\r\nHost: a\r\nExpect: tea", 417),
        (b"GET /mcp HTTP/1.1" + b"\r\nA: b" * 101, 431),
        (b"GET /mcp HTTP/1.1\r\nA: " + b"b" * 20000, 431),
    ],
)
def test_a_request_that_is_wrong_is_refused_with_its_status(head: bytes, status: int) -> None:
    assert requests(head + b"\r\n\r\n") == ([], status)


def test_a_response_says_how_long_it_is_and_whether_more_may_follow() -> None:
    assert response(202, keep_alive=True) == (
        b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n"
    )


LOCAL = ["127.0.0.1", "127.0.0.1:8222", "localhost:1", "LOCALHOST", "[::1]:80", "[::1]"]
ELSEWHERE = ["", "evil.example", "evil.example:8222", "127.0.0.1.evil.example", "127.0.0.1:x",
             "localhost:80@evil", "10.0.2.2:80", "::1", "127.0.0.1:1:2"]  # fmt: skip


@pytest.mark.parametrize("name", LOCAL)
def test_the_machine_itself_is_let_in(name: str) -> None:
    check_local({"host": name, "origin": f"http://{name}"})
    check_local({})


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_origin_or_host_is_refused(name: str) -> None:
    with pytest.raises(HttpFault, match="Host"):
        check_local({"host": name})
    for origin in (f"http://{name}", name, "null"):
        with pytest.raises(HttpFault, match="Origin"):
            check_local({"host": "127.0.0.1", "origin": origin})
