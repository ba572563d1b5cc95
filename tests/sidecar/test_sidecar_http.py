"""The guest-facing HTTP interface on a real server, over TCP and over a Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecar_kit import RUN_ID, RunningSidecar, entry, inbox, intent, running_sidecar

from voidbus.sidecar.connection import Connections
from voidbus.sidecar.event import SidecarEvent
from voidbus.sidecar.server import MAX_REPORTED_REPEATS, SidecarError, SidecarServer
from voidbus.sidecar.state import SidecarState


@pytest.fixture(params=["tcp", "unix"])
def sidecar(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningSidecar]:
    with running_sidecar(("127.0.0.1", 0) if request.param == "tcp" else tmp_path / "s") as one:
        yield one


def test_health_says_who_and_how_full(sidecar: RunningSidecar) -> None:
    sidecar.server.load_inbox(inbox("a", version=4))
    sidecar.post(intent())
    status, body = sidecar.call("GET", "/v1/health")
    assert status == 200
    assert body.pop("uptime_ms") >= 0
    assert body == {
        "status": "ok",
        "sidecar_version": "0.2.0",
        "run_id": RUN_ID,
        "buffer_depth": 1,
        "inbox_version": 4,
    }
    assert sidecar.server.status().model_dump() == {
        "status": "ok",
        "buffer_depth": 1,
        "inbox_version": 4,
    }


def test_loading_an_inbox_changes_only_the_iteration_of_the_context(
    sidecar: RunningSidecar,
) -> None:
    expected = {
        "execution_id": RUN_ID,
        "candidate_id": RUN_ID,
        "iteration": 0,
        "role": "candidate",
        "peers": [],
        "sidecar_version": "0.2.0",
    }
    assert sidecar.call("GET", "/v1/context") == (200, expected)
    sidecar.server.load_inbox(inbox(iteration=3))
    assert sidecar.call("GET", "/v1/context") == (200, {**expected, "iteration": 3})


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["a", "m"]),
        ("?since=0", ["a", "m"]),
        ("?since=1", ["m"]),
        ("?since=2", []),
        ("?since=99999999999999999999", []),
        ("?since=-1", ["a", "m"]),
        ("?since=x", ["a", "m"]),
        ("?since=", ["a", "m"]),
        (f"?since={'9' * 5000}", ["a", "m"]),
        ("?since=%D9%A1", ["a", "m"]),
    ],
)
def test_the_inbox_since_a_version(
    sidecar: RunningSidecar, query: str, expected: list[str]
) -> None:
    sidecar.server.load_inbox(inbox("a", version=1))
    sidecar.server.push_message(entry("m", {"x": [1, None]}))
    status, body = sidecar.call("GET", f"/v1/inbox{query}")
    assert status == 200
    assert [one["message_id"] for one in body["entries"]] == expected
    assert {name: body[name] for name in ("version", "execution_id", "iteration")} == {
        "version": 2,
        "execution_id": "e",
        "iteration": 1,
    }


def test_an_object_gives_an_object_an_array_an_array_and_201_even_for_duplicates(
    sidecar: RunningSidecar,
) -> None:
    status, one = sidecar.post(intent("a"))
    assert (status, one["payload"], one["ttl_iterations"]) == (201, "a", 2)
    assert sidecar.post([intent("a"), intent("b")])[1][0] == one
    assert sidecar.post(intent("a")) == (201, one)
    assert sidecar.post([]) == (201, [])
    assert sidecar.post(intent("zzz"), Idempotency_Key="k")[1]["payload"] == "zzz"
    assert sidecar.post(intent("other"), idempotency_key="k")[1]["payload"] == "zzz"


@pytest.mark.parametrize(
    ("body", "status", "code", "retryable"),
    [
        (b"{", 400, "INVALID_PARAMS", False),
        (b"", 400, "INVALID_PARAMS", False),
        (json.dumps(intent(kind="wish")).encode(), 400, "INVALID_PARAMS", False),
        (json.dumps(intent("x" * 4096)).encode(), 413, "PAYLOAD_TOO_LARGE", False),
        (b" " * 65537, 413, "PAYLOAD_TOO_LARGE", False),
        (b" " * 65536, 400, "INVALID_PARAMS", False),
        (json.dumps([intent(n) for n in range(4)]).encode(), 429, "TOO_MANY_REQUESTS", True),
        # The time in its header set, or every process would name this test otherwise.
        (gzip.compress(json.dumps(intent()).encode(), mtime=0), 400, "INVALID_PARAMS", False),
    ],
)
def test_refused_bodies(
    sidecar: RunningSidecar, body: bytes, status: int, code: str, retryable: bool
) -> None:
    headers = {"Content_Encoding": "gzip"} if body.startswith(b"\x1f\x8b") else {}
    answered, error = sidecar.call("POST", "/v1/intents", body, **headers)
    assert (answered, error["code"], error["retryable"]) == (status, code, retryable)
    assert error["message"]
    assert "intent_rejected" in sidecar.kinds() or len(body) > 65536


def test_a_typed_rejection_names_field_found_and_allowed(sidecar: RunningSidecar) -> None:
    _, error = sidecar.post(intent(priority="urgent"))
    assert error == {
        "code": "INVALID_PARAMS",
        "message": "invalid intent: 'priority' is 'urgent'; allowed: low, normal, high",
        "retryable": False,
        "field": "priority",
        "found": "'urgent'",
        "allowed": ["low", "normal", "high"],
    }
    assert set(sidecar.call("GET", "/nope")[1]) == {"code", "message", "retryable"}


def test_a_chunked_body_is_read_and_bounded(sidecar: RunningSidecar) -> None:
    head = b"POST /v1/intents HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = json.dumps(intent()).encode()
    assert sidecar.raw(head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))[0] == 201
    large = b"8000\r\n%s\r\n" % (b" " * 0x8000)
    assert sidecar.raw(head + large * 3 + b"0\r\n\r\n")[0] == 413
    assert sidecar.raw(head + b"zz\r\n")[0] == 400


def test_expect_100_continue_is_answered(sidecar: RunningSidecar) -> None:
    body = json.dumps(intent()).encode()
    with sidecar.connect() as connection:
        connection.sendall(
            b"POST /v1/intents HTTP/1.1\r\nHost: s\r\nExpect: 100-continue\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 201")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", "/v1/intents"),
        ("POST", "/v1/inbox"),
        ("DELETE", "/v1/health"),
        ("GET", "/v1/health/"),
        ("GET", "/v1/%ff"),
    ],
)
def test_an_unknown_route_is_named(sidecar: RunningSidecar, method: str, path: str) -> None:
    status, error = sidecar.call(method, path)
    assert (status, error["code"], error["retryable"]) == (404, "NOT_FOUND", False)
    assert error["message"].startswith(f"no route for {method} /")


def test_each_thing_that_happens_is_reported(sidecar: RunningSidecar) -> None:
    sidecar.server.load_inbox(inbox(version=1, iteration=1))
    sidecar.post([intent(1), intent(1), intent("x" * 5000)])
    sidecar.call("GET", "/v1/health")
    sidecar.server.load_inbox(inbox(version=2, iteration=4))
    sidecar.post(intent(2))
    sidecar.server.push_message(entry("m"))
    waiting = sidecar.server.peek()
    sidecar.server.acknowledge(one.intent_id for one in waiting)
    sidecar.server.drain()
    sidecar.server.stop(timeout=10)
    assert sidecar.kinds() == [
        "started",
        "inbox_loaded",
        "intent_accepted",
        "intent_deduplicated",
        "intent_rejected",
        "health_served",
        "inbox_loaded",
        "intent_expired",
        "intent_accepted",
        "message_pushed",
        "acknowledged",
        "drained",
        "stopping",
    ]
    assert sidecar.events[2].fields["kind"] == "signal"
    assert all("payload" not in event.fields for event in sidecar.events)
    assert json.dumps([event.fields for event in sidecar.events])


def test_drained_intents_leave_in_order_and_only_once(sidecar: RunningSidecar) -> None:
    sidecar.post([intent(1), intent(2), intent(3)])
    assert [one.payload for one in sidecar.server.drain(2)] == [1, 2]
    assert [one.payload for one in sidecar.server.drain()] == [3]
    assert sidecar.server.counters().acknowledged == 3


def test_a_stopped_server_refuses_connections_and_keeps_its_state(
    sidecar: RunningSidecar,
) -> None:
    sidecar.post(intent())
    sidecar.server.stop(timeout=10)
    sidecar.server.stop(timeout=10)
    with pytest.raises(OSError):
        sidecar.connect().close()
    assert len(sidecar.server.snapshot().intents) == 1
    assert not [t for t in threading.enumerate() if t.name == f"sidecar-{RUN_ID}"]


def test_stopping_cuts_a_client_that_is_still_connected(sidecar: RunningSidecar) -> None:
    with sidecar.connect() as connection:
        connection.sendall(b"POST /v1/intents HTTP/1.1\r\nHost: s\r\nContent-Length: 9\r\n\r\n")
        sidecar.call("GET", "/v1/health")
        sidecar.server.stop(timeout=10)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(65536) == b""


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=st.binary(max_size=2000) | st.text().map(lambda text: json.dumps(text).encode()))
def test_fuzzed_bodies_get_a_json_answer(sidecar: RunningSidecar, body: bytes) -> None:
    status, answer = sidecar.call("POST", "/v1/intents", body)
    assert status == 400 or (status, answer) == (201, [])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(payload=_json, changes=st.dictionaries(st.sampled_from(["kind", "priority", "x"]), _json))
def test_fuzzed_intents_are_answered_and_come_back_whole(
    sidecar: RunningSidecar, payload: Any, changes: dict[str, Any]
) -> None:
    sidecar.server.load_inbox(inbox())
    sidecar.server.drain()
    status, answer = sidecar.post({**intent(payload), **changes})
    assert status in (201, 400)
    if status == 201:
        assert answer["payload"] == payload


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(min_size=1, max_size=300))
def test_bytes_that_are_no_http_leave_the_server_well(
    sidecar: RunningSidecar, noise: bytes
) -> None:
    with sidecar.connect() as connection:
        connection.sendall(noise)
    assert sidecar.call("GET", "/v1/health")[0] == 200


def test_a_failing_listener_does_not_disturb_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(event: SidecarEvent) -> None:
        raise ValueError(event.kind)

    state = SidecarState(execution_id="r", candidate_id="r")
    server = SidecarServer(state, run_id="r", on_event=fail)
    server.start()
    assert server.drain() == []
    server.stop()
    assert "the listener failed on drained" in caplog.text


def test_an_address_in_use_is_said_to_be(tmp_path: Path) -> None:
    with running_sidecar() as running:
        other = SidecarServer(
            SidecarState(execution_id="r", candidate_id="r"),
            run_id="r",
            listen=running.address,
            on_event=lambda event: None,
        )
        with pytest.raises(SidecarError, match="can't listen on"):
            other.start()
        with pytest.raises(SidecarError, match="started before"):
            running.server.start()
    other.stop()


def test_a_unix_socket_is_private_and_gone_after_the_stop(tmp_path: Path) -> None:
    path = tmp_path / "sidecar.sock"
    with running_sidecar(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_stale_unix_socket_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    path = tmp_path / "sidecar.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with running_sidecar(path) as running:
        assert running.call("GET", "/v1/health")[0] == 200
        with pytest.raises(SidecarError, match="another process serves"), running_sidecar(path):
            pass
    path.write_text("mine")
    with pytest.raises(SidecarError, match="is not a socket"), running_sidecar(path):
        pass
    assert path.read_text() == "mine"


class _Silent(asyncio.Protocol):
    pass


def test_a_connection_is_cut_at_its_deadline_and_one_too_many_is_told_so() -> None:
    async def scene() -> tuple[bytes, bytes, int]:
        connections = Connections(_Silent, limit=1, deadline=0.2)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            connections.listen(listener)
            port = listener.getsockname()[1]
            async with asyncio.timeout(10):
                first, first_out = await asyncio.open_connection("127.0.0.1", port)
                second, second_out = await asyncio.open_connection("127.0.0.1", port)
                refused = await second.read()
                try:
                    cut = await first.read()
                except ConnectionResetError:
                    cut = b""
            for writer in (first_out, second_out):
                writer.close()
            connections.stop_listening(listener)
            await connections.close(1)
        return refused, cut, len(connections)

    refused, cut, still_open = asyncio.run(scene())
    assert refused.startswith(b"HTTP/1.1 429")
    assert b'"too many connections"' in refused
    assert (cut, still_open) == (b"", 0)


def test_a_connection_made_while_the_server_stops_is_not_leaked() -> None:
    for _ in range(20):
        with running_sidecar() as running:
            connection = running.connect()
        connection.close()


def test_a_guest_that_repeats_itself_does_not_flood_the_events() -> None:
    with running_sidecar() as sidecar:
        sidecar.post([intent("same")] * 200)
        sidecar.post({})
        assert len(sidecar.events) == MAX_REPORTED_REPEATS + 2  # started, intent_accepted
        sidecar.server.load_inbox(inbox())
        sidecar.post({})
        assert sidecar.kinds()[-1] == "intent_rejected"
        counters = sidecar.server.counters()
        assert (counters.deduplicated, counters.rejected) == (199, 2)
