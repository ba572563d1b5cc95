"""void-mcp over HTTP: sessions, streams, bounds, and requests that are wrong."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcp_kit import (
    ENVELOPE,
    INBOX,
    STATELESS,
    Events,
    HttpMcp,
    call,
    http_mcp,
    message,
    parse,
    stdio_mcp,
    stuck_sidecar,
)
from sidecar_kit import RunningSidecar, entry

import voidbus.mcp.http_server as server_module
from voidbus.mcp.sessions import MAX_SESSIONS, MAX_UNTOLD, Outbox


@pytest.fixture
def mcp(sidecar: RunningSidecar) -> Iterator[HttpMcp]:
    with http_mcp(sidecar.url) as server:
        yield server


def modern(method: str, request_id: int | str = 1, **params: Any) -> dict[str, Any]:
    return message(method, request_id, _meta=ENVELOPE, **params)


def modern_headers(body: dict[str, Any], **changes: str) -> dict[str, str]:
    headers = {"MCP_Protocol_Version": STATELESS, "Mcp_Method": body["method"]}
    name = body["params"].get("name") or body["params"].get("uri")
    return {**headers, **({"Mcp_Name": name} if name else {}), **changes}


def open_stream(mcp: HttpMcp, *headers: str, body: bytes = b"") -> socket.socket:
    connection = mcp.connect()
    method = "POST" if body else "GET"
    lines = [f"{method} /mcp HTTP/1.1", "Host: localhost", "Accept: text/event-stream", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


# Sessions


def test_a_session_begins_with_initialize_and_ends_with_delete(mcp: HttpMcp) -> None:
    session = mcp.initialize()
    assert mcp.post(message("notifications/initialized"), Mcp_Session_Id=session) == (202, None)
    status, answer = mcp.post(call("read_shared_context", 1), Mcp_Session_Id=session)
    assert (status, answer["result"]["structuredContent"]["role"]) == (200, "candidate")
    assert mcp.request("DELETE", Mcp_Session_Id=session)[0] == 200
    for method, body in (("POST", b'{"id":1,"method":"ping"}'), ("GET", b""), ("DELETE", b"")):
        headers = {"Mcp_Session_Id": session, "Accept": "text/event-stream"}
        status, _, answer = mcp.request(method, body, **headers)
        assert status == 404
        assert "initialize anew" in json.loads(answer)["error"]["message"]


def test_what_needs_a_session_says_so_and_calls_do_not(mcp: HttpMcp) -> None:
    assert mcp.request("DELETE")[0] == 400
    assert mcp.request("GET", Accept="text/event-stream")[0] == 400
    status, answer = mcp.post(call("read_peer_messages", 1))
    assert (status, answer["id"]) == (200, 1)
    assert mcp.post(message("notifications/initialized")) == (202, None)


def test_sessions_are_bounded_and_the_one_used_longest_ago_makes_room(mcp: HttpMcp) -> None:
    sessions = [mcp.initialize() for _ in range(MAX_SESSIONS)]
    assert mcp.post(message("ping", 1), Mcp_Session_Id=sessions[0])[0] == 200
    sessions.append(mcp.initialize())
    found = [mcp.post(message("ping", 1), Mcp_Session_Id=each)[0] for each in sessions]
    assert [number for number, status in enumerate(found) if status != 200] == [1]
    assert len(set(sessions)) == len(sessions)


# Requests that are wrong


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/", {}, 404),
        ("POST", "/mcp/", {}, 404),
        ("PUT", "/mcp", {}, 405),
        ("OPTIONS", "/mcp", {}, 405),
        ("GET", "/mcp", {}, 406),
        ("POST", "/mcp", {"Accept": "text/html"}, 406),
        ("POST", "/mcp", {"Origin": "https://evil.example"}, 403),
        ("POST", "/mcp", {"Host": "evil.example:8222"}, 403),
        ("POST", "/mcp", {"MCP_Protocol_Version": "1999-01-01"}, 400),
        ("POST", "/mcp?x=1", {"Origin": "http://localhost:5173"}, 200),
        ("POST", "/mcp", {"Accept": "application/json;q=1, text/event-stream"}, 200),
    ],
)
def test_a_request_is_refused_with_the_status_for_it(
    mcp: HttpMcp, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    body = json.dumps(message("ping", 1)).encode() if method == "POST" else b""
    found, told, answer = mcp.request(method, body, path, **headers)
    assert found == status
    assert (status == 405) == ("allow" in told)
    assert status == 200 or json.loads(answer)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "code"), [(b"{", -32700), (b"[]", -32600), (b'{"id":[]}', -32600), (b"", -32700)]
)
def test_a_body_that_is_no_message_is_400_without_an_id(
    mcp: HttpMcp, body: bytes, code: int
) -> None:
    status, answer = mcp.post(body)
    assert (status, answer["error"]["code"], "id" in answer) == (400, code, False)


def test_an_array_is_answered_with_an_array(mcp: HttpMcp) -> None:
    status, answers = mcp.post([message("ping", 1), message("x"), call("read_shared_context", 2)])
    assert (status, [one["id"] for one in answers]) == (200, [1, 2])
    assert mcp.post([message("x"), message("y")]) == (202, None)


def test_a_body_over_the_limit_is_refused_and_the_answer_is_read(mcp: HttpMcp) -> None:
    status, answer = mcp.post(b" " * 300_000)
    assert (status, "over 262144 bytes" in answer["error"]["message"]) == (413, True)


def test_a_connection_carries_many_requests_also_when_they_come_at_once(mcp: HttpMcp) -> None:
    body = json.dumps(message("ping", 1)).encode()
    one = b"POST /mcp HTTP/1.1\r\nHost: [::1]:1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    answer = mcp.raw(one * 5)
    assert answer.count(b"HTTP/1.1 200 OK") == 5
    assert mcp.raw(one.replace(b"HTTP/1.1", b"HTTP/1.0")).count(b"Connection: close") == 1


def test_chunks_and_100_continue_are_served(mcp: HttpMcp) -> None:
    body = json.dumps(message("ping", 1)).encode()
    head = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    with mcp.connect() as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")


def test_a_client_that_takes_events_only_is_answered_with_one(mcp: HttpMcp) -> None:
    data = json.dumps(message("initialize", 1)).encode()
    with open_stream(mcp, body=data) as connection, Events(connection) as events:
        assert b"Mcp-Session-Id: " in events.head
        assert b"text/event-stream" in events.head
        answer = events.next()
        assert answer is not None
        assert answer["result"]["serverInfo"]["name"] == "void-mcp"
        assert events.next() is None


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    noise=st.binary(min_size=1, max_size=300),
    start=st.sampled_from([b"", b"POST /mcp HTTP/1.1\r\n"]),
)
def test_bytes_that_are_no_request_leave_the_server_well(
    mcp: HttpMcp, noise: bytes, start: bytes
) -> None:
    answer = mcp.raw(start + noise)
    assert not answer or parse(answer)[0] in (200, 202, 400, 403, 404, 405, 413, 417, 431, 501, 505)
    assert mcp.post(message("ping", 1))[0] == 200


# Bounds


def test_a_connection_too_many_is_told_so(mcp: HttpMcp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    with mcp.connect() as first, mcp.connect() as second:
        for one in (first, second):
            one.sendall(b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
                        b"Content-Length: 5\r\n\r\n")  # fmt: skip
            assert one.recv(100).startswith(b"HTTP/1.1 100")
        assert parse(mcp.raw(b""))[0] == 503


def test_a_request_that_does_not_come_to_its_end_and_an_idle_client_are_cut(
    mcp: HttpMcp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "REQUEST_SECONDS", 0.1)
    assert parse(mcp.raw(b"POST /mcp HTTP/1.1\r\n", half_close=False))[0] == 408
    monkeypatch.setattr(server_module, "IDLE_SECONDS", 0.1)
    assert mcp.raw(b"", half_close=False) == b""


def test_an_outbox_is_bounded_and_holds_the_same_once() -> None:
    outbox = Outbox()
    for number in range(MAX_UNTOLD + 5):
        outbox.put({"n": number})
        outbox.put({"n": number})
    bell = outbox.open()
    taken = outbox.take(bell)
    assert taken is not None
    assert [one["n"] for one in taken] == list(range(5, MAX_UNTOLD + 5))
    outbox.close(bell)


# Streams and cancelling


def test_a_session_is_told_on_its_stream_of_what_arrives(
    mcp: HttpMcp, sidecar: RunningSidecar
) -> None:
    session = mcp.initialize()
    subscribe = message("resources/subscribe", 1, uri=INBOX)
    assert mcp.post(subscribe, Mcp_Session_Id=session)[1]["result"] == {}
    header = f"Mcp-Session-Id: {session}"
    with open_stream(mcp, header) as connection, Events(connection) as events:
        sidecar.server.push_message(entry("m"))
        told = events.next()
        assert told is not None
        assert (told["method"], told["params"]) == (
            "notifications/resources/updated",
            {"uri": INBOX},
        )
        # A client that has lost its stream opens it anew; the old one ends.
        with open_stream(mcp, header) as again, Events(again) as new:
            assert events.next() is None
            sidecar.server.push_message(entry("n"))
            assert new.next() == told
            assert mcp.request("DELETE", Mcp_Session_Id=session)[0] == 200
            assert new.next() is None
    while sidecar.server.followers():
        assert mcp.post(message("ping", 1))[0] == 200


def test_what_happens_while_no_stream_is_open_is_told_on_the_next(
    mcp: HttpMcp, sidecar: RunningSidecar
) -> None:
    session = mcp.initialize()
    mcp.post(message("resources/subscribe", 1, uri=INBOX), Mcp_Session_Id=session)
    sidecar.server.push_message(entry("m"))
    with (
        open_stream(mcp, f"Mcp-Session-Id: {session}") as connection,
        Events(connection) as events,
    ):
        told = events.next()
        assert told is not None
        assert told["method"] == "notifications/resources/updated"


def test_a_stream_beats_and_ends_at_its_age(mcp: HttpMcp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "STREAM_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "HEARTBEAT_SECONDS", 0.01)
    with (
        open_stream(mcp, f"Mcp-Session-Id: {mcp.initialize()}") as connection,
        Events(connection) as events,
    ):
        assert events.file.readline() == b":\n"
        assert events.next() is None


def test_a_cancelled_call_of_a_session_leaves_the_sidecar_and_its_response_says_so() -> None:
    with stuck_sidecar() as stuck, http_mcp(stuck.url) as mcp, ThreadPoolExecutor(1) as pool:
        session = mcp.initialize()
        waiting = pool.submit(mcp.post, call("read_shared_context", "s"), Mcp_Session_Id=session)
        assert stuck.asked.wait(20)
        cancel = message("notifications/cancelled", requestId="s")
        assert mcp.post(cancel, Mcp_Session_Id=session) == (202, None)
        assert stuck.left.wait(5)
        status, answer = waiting.result(10)
        assert (status, answer["id"], answer["error"]["code"]) == (200, "s", -32800)


def test_the_stop_ends_calls_under_way_with_and_without_a_session() -> None:
    for with_session in (True, False):
        with stuck_sidecar() as stuck, ThreadPoolExecutor(1) as pool:
            with http_mcp(stuck.url) as mcp:
                headers = {"Mcp_Session_Id": mcp.initialize()} if with_session else {}
                waiting = pool.submit(mcp.post, call("read_shared_context", "s"), **headers)
                assert stuck.asked.wait(20)
            assert stuck.left.wait(5)
            assert waiting.result(10)[1]["error"]["code"] == -32800


# Since 2026-07-28


def test_since_2026_a_request_stands_for_itself(mcp: HttpMcp) -> None:
    for body in (modern("server/discover"), modern("tools/list"),
                 modern("tools/call", name="read_shared_context", arguments={}),
                 modern("resources/read", uri=INBOX)):  # fmt: skip
        status, answer = mcp.post(body, **modern_headers(body))
        assert (status, answer["result"]["resultType"]) == (200, "complete")


@pytest.mark.parametrize(
    ("body", "changes", "status", "code"),
    [
        (modern("ping"), {}, 404, -32601),
        (modern("tools/list"), {"Mcp_Method": "ping"}, 400, -32020),
        (modern("tools/list"), {"MCP_Protocol_Version": "2025-06-18"}, 400, -32020),
        (modern("tools/call", name="read_shared_context"), {"Mcp_Name": "x"}, 400, -32020),
        (message("tools/list", 1), {}, 400, -32020),
        (modern("tools/call", name="dance"), {"Mcp_Name": "=?base64?ZGFuY2U=?="}, 400, -32602),
        (modern("tools/call", name="dance"), {"Mcp_Name": "=?base64?Z?="}, 400, -32020),
    ],
)
def test_since_2026_headers_and_body_agree_and_errors_have_statuses(
    mcp: HttpMcp, body: dict[str, Any], changes: dict[str, str], status: int, code: int
) -> None:
    found, answer = mcp.post(body, **modern_headers(body, **changes))
    assert (found, answer["error"]["code"], answer["id"]) == (status, code, 1)


def test_since_2026_a_client_listens_by_a_request_that_is_answered_at_the_end(
    sidecar: RunningSidecar,
) -> None:
    body = modern("subscriptions/listen", "l", notifications={"resourceSubscriptions": [INBOX]})
    headers = [f"{name.replace('_', '-')}: {value}" for name, value in modern_headers(body).items()]
    with http_mcp(sidecar.url) as mcp:
        connection = open_stream(mcp, *headers, body=json.dumps(body).encode())
        events = Events(connection)
        acknowledged = events.next()
        assert acknowledged is not None
        assert acknowledged["method"] == "notifications/subscriptions/acknowledged"
        sidecar.server.push_message(entry("m"))
        told = events.next()
        assert told is not None
        assert told["method"] == "notifications/resources/updated"
    with connection, events:
        ended = events.next()
        assert ended is not None
        assert (ended["id"], ended["result"]["resultType"]) == ("l", "complete")
        assert events.next() is None


def test_since_2026_closing_the_connection_cancels() -> None:
    body = modern("tools/call", "s", name="read_shared_context", arguments={})
    headers = [f"{name.replace('_', '-')}: {value}" for name, value in modern_headers(body).items()]
    with stuck_sidecar() as stuck, http_mcp(stuck.url) as mcp:
        with open_stream(mcp, *headers, body=json.dumps(body).encode()):
            assert stuck.asked.wait(20)
        assert stuck.left.wait(5)


# The process


@pytest.mark.parametrize("option", ["--http", "--sse"])
def test_the_program_says_where_it_serves_and_ends_at_a_signal(
    option: str, sidecar: RunningSidecar
) -> None:
    with stdio_mcp(sidecar.url, option, "--port=0") as process:
        line = process.errors.readline().decode()
        assert line.startswith("void-mcp: serving on http://127.0.0.1:")
        port = int(line.rpartition(":")[2].partition("/")[0])
        mcp = HttpMcp(port)
        session = mcp.initialize()
        with (
            open_stream(mcp, f"Mcp-Session-Id: {session}") as connection,
            Events(connection) as events,
        ):
            process.process.send_signal(signal.SIGTERM)
            assert events.next() is None
        assert process.process.wait(10) == 0
        assert process.errors.read() == b""
