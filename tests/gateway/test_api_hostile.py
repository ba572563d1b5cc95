"""Clients that mean no good: what they send, and how much of it."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import re
import select
import socket
import threading
import time
import uuid
from pathlib import Path

import pytest
from api_kit import TOKEN, ApiHouse, step, structured, workflow
from http_kit import HttpClient

from voidbus.gateway.server import MAX_CONNECTIONS


def resident(house: ApiHouse) -> int:
    """Bytes of memory of the supervisor."""
    assert house.supervisor.process is not None
    pages = Path(f"/proc/{house.supervisor.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def status_of(received: bytes) -> bytes:
    """The status of an answer's first line; nothing where the connection was closed instead."""
    match = re.match(rb"HTTP/[01]\.[019] ([0-9]{3}) ", received)
    return match[1] if match else received


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\n",
        b"\0" * 1000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET /v1/health\r\n\r\n",
        b"GET /v1/health HTTP/9.9\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\n: empty\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nA: b\0c\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/runs HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"POST /v1/runs HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"POST /v1/runs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"POST /v1/runs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
        b"POST /v1/runs HTTP/1.1\r\nTransfer-Encoding: gzip, nonsense\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"G" * 100_000,
        b"GET /v1/health HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /v1/health HTTP/1.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
        b"GET /v1/health HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % n for n in range(2000)) + b"\r\n",
    ],
)
def test_what_is_no_request_is_refused_and_closed(door: HttpClient, data: bytes) -> None:
    received = door.raw(data, shut=True)
    assert status_of(received) in (b"", b"400", b"404", b"413", b"431"), received[:200]
    assert door.get("/v1/health").status == 200


def test_garbage_behind_a_request_does_not_change_its_answer(door: HttpClient) -> None:
    with door.connect() as sock:
        sock.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n\x00\x01GARBAGE\r\n\r\n")
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
    first, _, rest = received.partition(b'{"status":"ok","persistence":"disk"}')
    assert first.startswith(b"HTTP/1.1 200 OK") or status_of(received) == b"400"
    assert b"Traceback" not in rest


def test_requests_sent_ahead_are_answered_in_order(api: HttpClient) -> None:
    with api.connect() as sock:
        auth = "".join(f"{name}: {value}\r\n" for name, value in api.auth.items())
        ahead = [
            f"GET /v1/runs/nobody-{number} HTTP/1.1\r\nHost: x\r\n{auth}\r\n"
            for number in range(50)
        ]
        sock.sendall("".join(ahead).encode())
        sock.sendall(api.head_bytes("GET /v1/health HTTP/1.1"))
        received = b""
        while chunk := sock.recv(65536):
            received += chunk
    told = [int(number) for number in re.findall(rb"nobody-(\d+)", received)]
    assert told == list(range(50))
    assert received.endswith(b'{"status":"ok","persistence":"disk"}')


# -- paths ---------------------------------------------------------------------------------------

TRICKS = [
    "..",
    "../..",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "....//....//etc/passwd",
    "%2fetc%2fpasswd",
    "..%5c..%5cup",
    "%00",
    "a%00b",
    "%c0%ae%c0%ae%c0%af",
    "%ed%a0%80",
    "x" * 5000,
    "journal.sqlite",
    "%0d%0aSet-Cookie:x",
    "'%20OR%201=1--",
    "%25%32%65",
]


@pytest.mark.parametrize("trick", TRICKS)
def test_a_name_that_is_a_trick_finds_nothing(
    door: HttpClient, house: ApiHouse, trick: str
) -> None:
    for method, path in (
        ("GET", f"/v1/runs/{trick}"),
        ("GET", f"/v1/runs/{trick}/events"),
        ("GET", f"/v1/runs/{trick}/events/stream"),
        ("GET", f"/v1/runs/{trick}/logs"),
        ("GET", f"/v1/runs/{trick}/stages"),
        ("GET", f"/v1/runs/{trick}/telemetry"),
        ("GET", f"/v1/runs/{trick}/intents"),
        ("POST", f"/v1/runs/{trick}/cancel"),
        ("GET", f"/v1/runs/{trick}/stages/a/output-file"),
        ("GET", f"/v1/runs/x/stages/{trick}/output-file"),
        ("GET", f"/v1/runs/x/stages/a/artifacts/{trick}"),
    ):
        answer = door.ask(method, path)
        assert answer.status in (400, 404), (path, answer)
        assert answer.problem[2] is False
        assert "set-cookie" not in answer.headers
        assert b"root:" not in answer.body


def test_names_of_stages_and_artifacts_that_are_tricks_write_nothing_outside(
    door: HttpClient, house: ApiHouse, tmp_path: Path
) -> None:
    around = house.supervisor.state_dir.parent
    before = {*around.iterdir(), *around.parent.iterdir()}
    name = "../../../escaped"
    names = ["../escaped", "/tmp/escaped-artifact", "..\\escaped", "a/../../escaped", "ok"]
    result = {"status": "ok", "artifacts": [{"name": each, "path": "note"} for each in names]}
    spec = workflow(
        tmp_path, step(name, structured(result, ("note", "x"))), output_step=name, name=name
    )
    run = door.finish(spec)
    assert run["status"] == "succeeded"
    kept = [e["name"] for e in run["artifact_publication"]["manifest"] if "size_bytes" in e]
    assert kept == ["result.json", "ok"]
    for entry in run["artifact_publication"]["manifest"]:
        assert door.get(entry["retrieval_path"]).status == 200
    after = {*around.iterdir(), *around.parent.iterdir()}
    assert [path for path in after - before if "escaped" in path.name] == []
    assert not list(house.supervisor.state_dir.rglob("*escaped*"))


def test_a_file_an_artifact_names_outside_the_guest_is_not_the_hosts(
    door: HttpClient, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"secret-{uuid.uuid4()}")
    named = [
        {"name": "one", "path": f"../../../../../../../../../../..{secret}"},
        {"name": "two", "path": "link"},
    ]
    script = structured({"status": "ok", "artifacts": named}) + f"\nln -s {secret} link"
    run = door.finish(workflow(tmp_path, step("a", script), output_step="a"))
    for name in ("one", "two"):
        answer = door.get(f"/v1/runs/{run['id']}/stages/a/artifacts/{name}")
        assert answer.problem[:2] == (404, "ARTIFACT_NOT_FOUND")


# -- bodies --------------------------------------------------------------------------------------


def test_large_bodies_are_not_held(door: HttpClient, house: ApiHouse) -> None:
    before = resident(house)
    chunk = b"x" * (1024 * 1024)

    def send() -> None:
        with door.connect() as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(door.head_bytes("POST /v1/runs HTTP/1.1", Content_Length=str(64 << 20)))
            for _ in range(64):
                sock.sendall(chunk)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert door.get("/v1/health").status == 200
    assert resident(house) - before < 150 * 1024 * 1024


def test_a_chunked_body_without_an_end_is_refused_at_the_limit(door: HttpClient) -> None:
    with door.connect() as sock:
        head = door.head_bytes("POST /v1/runs HTTP/1.1", Transfer_Encoding="chunked")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(head)
            for _ in range(100):
                sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        response = http.client.HTTPResponse(sock)
        response.begin()
        with response:
            assert (response.status, response.getheader("content-length")) == (413, "0")


def test_a_body_that_is_compressed_is_not_opened(door: HttpClient) -> None:
    bomb = gzip.compress(b'{"file": "' + b"x" * (100 * 1024 * 1024) + b'"}', 9)
    answer = door.ask("POST", "/v1/runs", bomb, {"Content-Encoding": "gzip"})
    assert answer.problem == (400, "INVALID_SPEC", False)


def test_slow_clients_hold_nobody_up(door: HttpClient) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(50):
            sock = stack.enter_context(door.connect())
            if number % 2:
                sock.sendall(b"GET /v1/hea")
            else:
                sock.sendall(door.head_bytes("POST /v1/runs HTTP/1.1", Content_Length="100"))
                sock.sendall(b'{"fi')
        began = time.monotonic()
        for _ in range(20):
            assert door.get("/v1/health").status == 200
        assert time.monotonic() - began < 10


def test_a_client_that_goes_in_the_middle_is_forgotten(door: HttpClient) -> None:
    for data in (
        b"GET /v1/hea",
        door.head_bytes("POST /v1/runs HTTP/1.1", Content_Length="100") + b"{",
        door.head_bytes("GET /v1/runs HTTP/1.1"),
    ):
        for _ in range(20):
            with door.connect() as sock:
                sock.sendall(data)
    assert door.get("/v1/health").status == 200


@pytest.mark.parametrize("depth", [1000, 100_000, 2_000_000])
def test_json_that_nests_deeply_is_refused(door: HttpClient, depth: int) -> None:
    for body in (b"[" * depth, b'{"a":' * (depth // 5), b'{"file": ' + b"[" * depth):
        answer = door.ask("POST", "/v1/runs", body)
        assert answer.problem == (400, "INVALID_SPEC", False)


def test_numbers_without_end_are_refused(door: HttpClient) -> None:
    digits = b"9" * 1_000_000
    for body in (
        b'{"file": "x", "policy": {"max_stage_retries": %s}}' % digits,
        b'{"file": "x", "policy": {"max_stage_retries": 1e999}}',
        b'{"file": "x", "policy": {"max_stage_retries": NaN}}',
        b'{"file": %s}' % digits,
    ):
        assert door.ask("POST", "/v1/runs", body).problem == (400, "INVALID_SPEC", False)


def test_an_error_does_not_repeat_megabytes(door: HttpClient) -> None:
    long = "x" * 1_000_000
    for answer in (
        door.post("/v1/runs", {"file": 7, long: 1, "run_id": long}),
        door.post("/v1/runs", {"file": "y", "run_id": long}),
        door.post("/v1/runs", {"file": "y", "policy": {"max_stage_retries": long}}),
    ):
        assert answer.status == 400
        assert len(answer.body) < 10_000


def test_half_a_character_is_refused_and_breaks_nothing(door: HttpClient) -> None:
    for field in (b'"file"', b'"input"', b'"run_id"'):
        body = b'{"file": "/nowhere", %s: "\\ud800"}' % field
        answer = door.ask("POST", "/v1/runs", body)
        assert answer.problem == (400, "INVALID_SPEC", False)
    for half in (b"\\ud800", b"\\uDFFF"):
        body = b'{"role": "user", "content": "%s"}' % half
        answer = door.ask("POST", "/v1/sessions/half/messages", body)
        assert answer.problem == (400, "INVALID_SPEC", False)
    body = b'{"role": "u", "content": "\\ud83d\\ude00"}'
    whole = door.ask("POST", "/v1/sessions/half/messages", body)
    assert whole.json["content"] == "\U0001f600"


def test_bytes_that_are_no_text_in_a_header_or_a_query_are_no_failure_of_ours(
    door: HttpClient, tmp_path: Path
) -> None:
    run_id = door.finish(workflow(tmp_path, step("a", "true")))["id"]
    path = f"/v1/runs/{run_id}"
    for line, headers in (
        (f"GET {path}/events/stream HTTP/1.1", {"Last_Event_ID": "\xff\xfe"}),
        (f"GET {path}/events?from_event_id=%ff%ed%a0%80 HTTP/1.1", {}),
        (f"GET {path}/logs?stage=%ff%ed%a0%80 HTTP/1.1", {}),
        (f"GET {path}/telemetry?stage_name=%ff%ed%a0%80 HTTP/1.1", {}),
        (f"GET {path}?api_version=%ff HTTP/1.1", {"If_None_Match": "\xff"}),
    ):
        received = door.raw(door.head_bytes(line, **headers))
        assert status_of(received) == b"200", received[:300]


def test_a_file_that_is_a_device_or_a_folder_is_a_run_that_fails(
    door: HttpClient, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for file in ("/dev/zero", "/dev/null", "/", str(fifo), "", "\0", "x" * 100_000):
        answer = door.post("/v1/runs", {"file": file})
        assert answer.status == 200, answer
        run = door.wait_end(answer.json["run_id"])
        assert run["status"] == "failed"


# -- numbers -------------------------------------------------------------------------------------


def test_guessing_tokens_gets_nowhere_and_leaves_no_trace(tcp: HttpClient, house: ApiHouse) -> None:
    before = len(house.supervisor.log)
    guesser = HttpClient(tcp.where)
    with guesser.open() as connection:
        for number in range(300):
            headers = {"Authorization": f"Bearer {number:032x}"}
            answer = guesser.ask("GET", "/v1/health", None, headers, connection=connection)
            assert answer.status == 401
    assert len(house.supervisor.log) - before < 1000
    assert TOKEN not in house.supervisor.log


def test_connections_past_the_limit_are_turned_away_and_those_before_it_served(
    unix: HttpClient, tcp: HttpClient, house: ApiHouse
) -> None:
    before = resident(house)
    turned_away = 0
    with contextlib.ExitStack() as stack:
        held = []
        for number in range(1100):
            client = unix if number % 2 else tcp
            sock = stack.enter_context(client.connect())
            held.append((client, sock))
        # Those that were turned away have been told so already, or will be.
        for _, sock in held[MAX_CONNECTIONS + 20 :]:
            poll = select.poll()
            poll.register(sock, select.POLLIN)
            if not poll.poll(10_000):
                continue
            received = sock.recv(65536)
            assert status_of(received) == b"429"
            assert json.loads(received.partition(b"\r\n\r\n")[2])["retryable"] is True
            turned_away += 1
        assert turned_away > 0
        client, sock = held[0]
        sock.sendall(client.head_bytes("GET /v1/health HTTP/1.1"))
        assert status_of(sock.recv(65536)) == b"200"
        assert resident(house) - before < 100 * 1024 * 1024
    deadline = time.monotonic() + 20
    while True:  # they are let go as the loop sees them gone
        with contextlib.suppress(OSError, http.client.HTTPException):
            if unix.get("/v1/health").status == 200:
                break
        assert time.monotonic() < deadline


def test_many_requests_at_once_are_all_answered(api: HttpClient) -> None:
    statuses: list[int] = []

    def ask() -> None:
        with api.open() as connection:
            for path in ("/v1/health", "/v1/runs/nobody", "/v1/runs?state=active") * 5:
                answer = api.ask("GET", path, connection=connection)
                statuses.append(answer.status)

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 300
    assert set(statuses) == {200, 404}


def test_a_follower_that_never_reads_holds_no_memory(
    door: HttpClient, house: ApiHouse, tmp_path: Path
) -> None:
    line = "x" * 2000
    run_id = door.start(workflow(tmp_path, step("a", f"yes {line} | head -8000")))
    before = resident(house)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            sock = stack.enter_context(door.connect())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(door.head_bytes(f"GET /v1/runs/{run_id}/events/stream HTTP/1.1"))
        door.wait_end(run_id)
        assert resident(house) - before < 150 * 1024 * 1024
