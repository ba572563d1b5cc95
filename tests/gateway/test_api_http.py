"""HTTP itself: what a request may look like and what every answer has (contract 1.1)."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from pathlib import Path

import pytest
from api_kit import gate, step, structured, workflow
from http_kit import HttpClient


def test_every_answer_says_what_it_is_and_how_long(api: HttpClient) -> None:
    for path in ("/v1/health", "/v1/runs", "/v1/runs/nobody", "/nowhere", "/metrics"):
        answer = api.get(path)
        assert int(answer.headers["content-length"]) == len(answer.body)
        assert "content-type" in answer.headers


def test_a_connection_serves_one_request_after_another(api: HttpClient) -> None:
    with api.open() as connection:
        connection.connect()
        sock = connection.sock
        for path in ("/v1/health", "/nowhere", "/v1/runs/nobody", "/v1/health"):
            api.ask("GET", path, connection=connection)
            assert connection.sock is sock


def test_a_client_that_wants_the_connection_closed_gets_that(api: HttpClient) -> None:
    received = api.raw(api.head_bytes("GET /v1/health HTTP/1.1"))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"connection: close" in head.lower()
    assert body == b'{"status":"ok","persistence":"disk"}'


def test_a_client_of_http_1_0_is_answered_and_let_go(api: HttpClient) -> None:
    lines = ["GET /v1/health HTTP/1.0", *(f"{k}: {v}" for k, v in api.auth.items()), "", ""]
    received = api.raw("\r\n".join(lines).encode())
    assert received.split(b" ", 2)[1] == b"200"
    assert received.endswith(b'{"status":"ok","persistence":"disk"}')


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /v1/health HTTP/1.1", b"200 OK"),
        ("GET /v1/runs/nobody HTTP/1.1", b"404 Not Found"),
        ("POST /v1/runs HTTP/1.1", b"400 Bad Request"),
    ],
)
def test_the_status_line_has_the_words_of_http(
    door: HttpClient, request_line: str, status: bytes
) -> None:
    received = door.raw(door.head_bytes(request_line, Content_Length="0"))
    assert received.split(b"\r\n")[0] == b"HTTP/1.1 " + status


def test_head_says_what_get_would_and_sends_no_body(api: HttpClient, tmp_path: Path) -> None:
    spec = workflow(tmp_path, step("a", structured({"status": "ok"})), output_step="a")
    run_id = api.finish(spec)["id"]
    for path in (
        "/v1/health",
        "/v1/runs/nobody",
        f"/v1/runs/{run_id}",
        f"/v1/runs/{run_id}/stages",
        f"/v1/runs/{run_id}/stages/a/output-file",
        "/openapi.json",
    ):
        got, head = api.get(path), api.ask("HEAD", path)
        assert (head.status, head.body) == (got.status, b"")
        for name in ("content-length", "content-type"):
            assert head.headers[name] == got.headers[name], path


def test_the_name_of_content_length_may_be_written_in_any_case(
    door: HttpClient, tmp_path: Path
) -> None:
    body = b'{"file": "/nowhere.yaml"}'
    head = door.head_bytes("POST /v1/runs HTTP/1.1").replace(
        b"Host:", b"cOnTeNt-LeNgTh: %d\r\nHost:" % len(body)
    )
    received = door.raw(head + body)
    assert received.startswith(b"HTTP/1.1 200 OK")


def test_a_body_may_come_in_chunks(door: HttpClient) -> None:
    head = door.head_bytes("POST /v1/runs HTTP/1.1", Transfer_Encoding="chunked")
    body = b'4\r\n{"fi\r\n14\r\nle":"/nowhere.yaml"}\r\n0\r\n\r\n'
    assert door.raw(head + body).startswith(b"HTTP/1.1 200 OK")


def test_a_body_over_four_mebibytes_is_refused_without_a_body(api: HttpClient) -> None:
    too_large = b'{"file": "' + b"x" * (5 * 1024 * 1024) + b'"}'
    with api.connect() as sock:
        head = api.head_bytes("POST /v1/runs HTTP/1.1", Content_Length=str(len(too_large)))
        # It may be answered before all of it was sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(head + too_large)
        response = http.client.HTTPResponse(sock)
        response.begin()
        with response:
            assert (response.status, response.reason) == (413, "Payload Too Large")
            assert response.getheader("content-length") == "0"


def test_a_body_of_almost_four_mebibytes_is_read(api: HttpClient) -> None:
    text = b'{"file": "/nowhere.yaml", "pad": "' + b"x" * (4 * 1024 * 1024 - 1000) + b'"}'
    answer = api.ask("POST", "/v1/runs", text)
    assert answer.status == 200
    assert api.wait_end(answer.json["run_id"])["status"] == "failed"


def test_a_body_that_ends_early_is_taken_as_it_is(api: HttpClient) -> None:
    head = api.head_bytes("POST /v1/runs HTTP/1.1", Content_Length="1000")
    received = api.raw(head + b'{"file": "/nowhere.yaml"}', shut=True)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert api.wait_end(run_of(received))["status"] == "failed"
    cut = api.raw(head + b'{"file": "/nowhere.ya', shut=True)
    assert cut.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"code": "INVALID_SPEC"' in cut


def test_chunks_that_end_early_are_taken_as_they_are(api: HttpClient) -> None:
    head = api.head_bytes("POST /v1/runs HTTP/1.1", Transfer_Encoding="chunked")
    received = api.raw(head + b'19\r\n{"file": "/nowhere.yaml"}\r\n', shut=True)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")


def run_of(received: bytes) -> str:
    """The run that an answer to a start names."""
    return str(json.loads(received.partition(b"\r\n\r\n")[2])["run_id"])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_will_send_no_more_gets_its_answer(api: HttpClient, version: str) -> None:
    head = api.head_bytes(f"GET /v1/health HTTP/{version}")
    kept = head.replace(b"Connection: close\r\n", b"")
    for request in (head, kept):
        received = api.raw(request, shut=True)
        assert received.startswith(f"HTTP/{version} 200 OK\r\n".encode())
        assert received.endswith(b'{"status":"ok","persistence":"disk"}')


def test_a_start_by_a_client_that_will_send_no_more_is_answered(api: HttpClient) -> None:
    body = b'{"file": "/nowhere.yaml"}'
    head = api.head_bytes("POST /v1/runs HTTP/1.1", Content_Length=str(len(body)))
    received = api.raw(head + body, shut=True)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert api.wait_end(run_of(received))["status"] == "failed"


def test_an_answer_that_takes_long_reaches_a_client_that_will_send_no_more(
    api: HttpClient, tmp_path: Path
) -> None:
    run_id = api.start(
        workflow(tmp_path, step("a", "trap 'exit 0' TERM; echo up; sleep 600 & wait"))
    )
    api.wait_log(run_id, "up")
    received = api.raw(api.head_bytes(f"POST /v1/runs/{run_id}/cancel HTTP/1.1"), shut=True)
    assert b'"state":"cancelled"' in received


def test_all_requests_of_a_client_that_will_send_no_more_are_answered(api: HttpClient) -> None:
    kept = api.head_bytes("GET /v1/health HTTP/1.1").replace(b"Connection: close\r\n", b"")
    received = api.raw(kept * 3, shut=True)
    assert received.count(b"HTTP/1.1 200 OK\r\n") == 3


def test_a_client_that_will_send_no_more_follows_a_run_to_its_end(
    api: HttpClient, tmp_path: Path
) -> None:
    opened = gate(tmp_path)
    run_id = api.start(workflow(tmp_path, step("a", f"{opened.wait}; echo done")))
    opener = threading.Thread(target=opened.open)
    opener.start()
    received = api.raw(api.head_bytes(f"GET /v1/runs/{run_id}/events/stream HTTP/1.1"), shut=True)
    opener.join()
    assert b'"event_type":"run.finished"' in received


def test_a_client_that_sends_half_a_head_and_no_more_is_let_go(api: HttpClient) -> None:
    for half in (b"", b"GET /v1/heal", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n"):
        assert api.raw(half, shut=True) == b""


@pytest.mark.parametrize("shut", [False, True])
def test_a_body_without_a_length_is_what_came_with_the_head(api: HttpClient, shut: bool) -> None:
    head = api.head_bytes("POST /v1/runs HTTP/1.1")
    received = api.raw(head + b'{"file": "/nowhere.yaml"}', shut=shut)
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert api.wait_end(run_of(received))["status"] == "failed"
    empty = api.raw(head, shut=shut)
    assert empty.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"code": "INVALID_SPEC"' in empty


def test_a_request_behind_one_without_a_body_is_no_body(api: HttpClient) -> None:
    head = api.head_bytes("POST /v1/runs/nobody/cancel HTTP/1.1")
    kept = head.replace(b"Connection: close\r\n", b"")
    received = api.raw(kept + api.head_bytes("GET /v1/health HTTP/1.1"))
    assert received.startswith(b"HTTP/1.1 404 Not Found\r\n")
    assert received.endswith(b'{"status":"ok","persistence":"disk"}')


def test_names_in_a_path_are_percent_decoded(door: HttpClient, tmp_path: Path) -> None:
    name = "build é/x"
    spec = workflow(tmp_path, step(name, structured({"status": "ok"})), output_step=name)
    run_id = door.finish(spec)["id"]
    encoded = door.get(f"/v1/runs/{run_id}/stages/build%20%C3%A9%2Fx/output-file")
    # The stage is what is behind the run, whatever slashes it has.
    plain = door.get(f"/v1/runs/{run_id}/stages/build%20%C3%A9/x/output-file")
    assert (encoded.status, plain.status) == (200, 200)
    assert encoded.json == plain.json == {"status": "ok"}
    dotted = run_id.replace("-", "%2D")
    assert door.get(f"/v1/runs/{dotted}").json["id"] == run_id


def test_a_query_is_percent_decoded_and_its_first_value_stands(
    door: HttpClient, tmp_path: Path
) -> None:
    run_id = door.finish(workflow(tmp_path, step("a", "true")))["id"]
    path = f"/v1/runs/{run_id}/telemetry"
    assert door.get(f"{path}?from_seq=%37").json["next_seq"] >= 7
    assert door.get(f"{path}?from_seq=70&from_seq=x").json["next_seq"] == 70
    assert door.get(f"{path}?&&=&x&from_seq=71&").json["next_seq"] == 71


def test_a_whole_url_is_taken_as_from_a_proxy(door: HttpClient) -> None:
    received = door.raw(door.head_bytes("GET http://anywhere/v1/health HTTP/1.1"))
    assert received.startswith(b"HTTP/1.1 200 OK")
