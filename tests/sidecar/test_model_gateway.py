"""The model gateway: what it passes on, what it keeps back, and what it counts."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import voidbus.sidecar.model_gateway as gateway_module
from voidbus.sidecar.model_endpoint import ModelEndpoint, ModelSpending, Prices
from voidbus.sidecar.model_gateway import GatewayError, ModelGateway
from voidbus.sidecar.token_count import MAX_LINE_BYTES, TokenCount

KEY, TOKEN = "sk-the-real-key", "voidbus-placeholder"
PATIENCE = 20.0
SSE = (
    b'event: message_start\ndata: {"message":{"usage":{"input_tokens":12,"output_tokens":1}}}\n\n',
    b'event: message_delta\ndata: {"usage":{"output_tokens":7}}\n\n',
)


@dataclass
class Upstream:
    """A model's server: what it was asked, and what it answers."""

    port: int = 0
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: answer_json(handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/base"


def answer_json(handler: BaseHTTPRequestHandler, status: int = 200, **headers: str) -> None:
    body = json.dumps({"usage": {"input_tokens": 3, "output_tokens": 2}}).encode()
    handler.send_response(status)
    for name, value in {**headers, "content-length": str(len(body))}.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    model = Upstream()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = PATIENCE

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            return

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            model.asked.append((self.command, self.path, headers, body))
            model.answer(self)

        def do_GET(self) -> None:
            self.do_POST()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    model.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield model
    finally:
        server.shutdown()
        thread.join(PATIENCE)
        server.server_close()


class Guest(http.client.HTTPConnection):
    """A program of the guest's, on the gateway's socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("127.0.0.1", timeout=PATIENCE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(str(self._path))


@contextlib.contextmanager
def running(folder: Path, url: str, **endpoint: Any) -> Iterator[Callable[..., Any]]:
    """A gateway; the function asks it, and gives status, headers and body."""
    path = folder / "model"
    gateway = ModelGateway(ModelEndpoint(url, TOKEN, **{"key": KEY, **endpoint}), path)
    gateway.start(PATIENCE)

    def ask(
        target: str = "/v1/messages?beta=true",
        body: bytes | None = b"{}",
        method: str = "POST",
        token: str = TOKEN,
        **headers: str,
    ) -> tuple[int, dict[str, str], bytes]:
        with contextlib.closing(Guest(path)) as guest:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            guest.request(method, target, body, {"x-api-key": token, **named})
            answer = guest.getresponse()
            return answer.status, dict(answer.headers.items()), answer.read()

    try:
        yield ask
    finally:
        gateway.stop(PATIENCE)
        assert not path.exists()


def error(body: bytes) -> str:
    return str(json.loads(body)["error"]["message"])


# -- what is passed on -------------------------------------------------------------------------


def test_the_key_is_added_and_the_guests_own_credentials_are_taken_away(
    tmp_path: Path, upstream: Upstream
) -> None:
    with running(tmp_path, upstream.url) as ask:
        status, _, _ = ask(
            authorization="Bearer stolen", cookie="c=1", anthropic_version="2023-06-01"
        )
    assert status == 200
    ((method, path, headers, body),) = upstream.asked
    assert (method, path, body) == ("POST", "/base/v1/messages?beta=true", b"{}")
    assert headers["x-api-key"] == KEY
    assert headers["anthropic-version"] == "2023-06-01"
    assert headers["host"] == f"127.0.0.1:{upstream.port}"
    assert not {"authorization", "cookie"} & headers.keys()
    assert TOKEN not in str(headers)


def test_a_bearer_key_is_shown_and_added_as_one(tmp_path: Path, upstream: Upstream) -> None:
    with running(tmp_path, upstream.url, bearer=True) as ask:
        assert ask(token="", authorization=f"Bearer {TOKEN}")[0] == 200
    headers = upstream.asked[0][2]
    assert headers["authorization"] == f"Bearer {KEY}"
    assert "x-api-key" not in headers


def test_an_answer_comes_as_the_model_writes_it(tmp_path: Path, upstream: Upstream) -> None:
    first_read = threading.Event()

    def stream(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.send_header("connection", "close")
        handler.end_headers()
        handler.wfile.write(SSE[0])
        # The second part is written once the guest has read the first.
        assert first_read.wait(PATIENCE)
        handler.wfile.write(SSE[1])
        handler.close_connection = True

    upstream.answer = stream
    spending = ModelSpending()
    with (
        running(tmp_path, upstream.url, spending=spending),
        contextlib.closing(Guest(tmp_path / "model")) as guest,
    ):
        guest.request("POST", "/v1/messages", b"{}", {"x-api-key": TOKEN})
        answer = guest.getresponse()
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.read(len(SSE[0])) == SSE[0]
        first_read.set()
        assert answer.read() == SSE[1]
    assert tuple(spending.totals()) == (1, 0, 12, 7, 0)


def test_a_large_request_is_passed_on_whole(tmp_path: Path, upstream: Upstream) -> None:
    body = b"x" * 3_000_000
    with running(tmp_path, upstream.url) as ask:
        assert ask(body=body)[0] == 200
    assert upstream.asked[0][3] == body


def test_an_error_of_the_models_is_the_guests_to_read(tmp_path: Path, upstream: Upstream) -> None:
    upstream.answer = lambda handler: answer_json(handler, 529, retry_after="3")
    with running(tmp_path, upstream.url) as ask:
        assert ask()[0] == 529


def test_a_redirect_is_not_followed_and_its_place_not_told(
    tmp_path: Path, upstream: Upstream
) -> None:
    elsewhere = {"location": "http://127.0.0.1:1/", "set-cookie": "a=b"}
    upstream.answer = lambda handler: answer_json(handler, 302, **elsewhere)
    with running(tmp_path, upstream.url) as ask:
        status, headers, _ = ask()
    assert status == 302
    assert not {"location", "set-cookie"} & {name.lower() for name in headers}
    assert len(upstream.asked) == 1


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "sk-another", "voidbus-placeholde"])
def test_who_does_not_show_the_placeholder_is_refused(
    tmp_path: Path, upstream: Upstream, token: str
) -> None:
    with running(tmp_path, upstream.url) as ask:
        assert ask(token=token)[0] == 401
    assert upstream.asked == []


@pytest.mark.parametrize(
    "target",
    ["/../admin", "/v1/%2e%2e/admin", "/v1/..", "http://127.0.0.1:1/v1/messages", "//evil/../x"],
)
def test_a_path_that_leaves_the_endpoint_is_refused(
    tmp_path: Path, upstream: Upstream, target: str
) -> None:
    with running(tmp_path, upstream.url) as ask:
        assert ask(target)[0] == 400
    assert upstream.asked == []


def test_a_path_can_not_name_another_host(tmp_path: Path, upstream: Upstream) -> None:
    with running(tmp_path, upstream.url) as ask:
        ask("//127.0.0.1:1/v1")
        ask("/@127.0.0.1:1/v1")
    assert [path for _, path, _, _ in upstream.asked] == [
        "/base//127.0.0.1:1/v1",
        "/base/@127.0.0.1:1/v1",
    ]


def test_other_methods_are_refused(tmp_path: Path, upstream: Upstream) -> None:
    with running(tmp_path, upstream.url) as ask:
        assert ask(method="DELETE")[0] == 405
        assert ask("/v1/models", None, "GET")[0] == 200
    assert [method for method, _, _, _ in upstream.asked] == ["GET"]


def test_a_request_that_is_too_large_or_of_no_length_is_refused(
    tmp_path: Path, upstream: Upstream
) -> None:
    with running(tmp_path, upstream.url) as ask:
        status, _, body = ask(body=None, content_length=str(gateway_module.MAX_BODY_BYTES + 1))
        assert (status, error(body)) == (413, "voidbus: a request is over 33554432 bytes")
        assert ask(body=None, transfer_encoding="chunked")[0] == 411


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /%%zz#?\\ HTTP/1.1\r\nHost: x\r\nx-api-key: %s\r\nContent-Length: 0\r\n\r\n"
        % TOKEN.encode(),
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_leave_the_gateway_well(
    tmp_path: Path, upstream: Upstream, data: bytes
) -> None:
    with running(tmp_path, upstream.url) as ask:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(PATIENCE)
            raw.connect(str(tmp_path / "model"))
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while raw.recv(65536):
                    pass
        assert ask()[0] == 200
    assert all(path.startswith("/base/") for _, path, _, _ in upstream.asked)


def test_a_model_that_is_not_there_is_a_502_without_the_key(tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with running(tmp_path, url) as ask:
            status, _, body = ask()
    assert status == 502
    assert error(body).startswith("voidbus: the model can't be reached: ")
    assert KEY.encode() not in body


def test_requests_beyond_the_limit_are_refused_and_counted(
    tmp_path: Path, upstream: Upstream
) -> None:
    spending = ModelSpending(max_requests=2)
    with running(tmp_path, upstream.url, spending=spending) as ask:
        statuses = [ask()[0] for _ in range(3)]
        assert ask("/v1/messages/count_tokens")[0] == 200, "it costs nothing"
        assert ask("/v1/models", None, "GET")[0] == 200
        assert "llm.max_requests of this run, 2, is used up" in error(ask()[2])
    assert statuses == [200, 200, 403]
    totals = spending.totals()
    assert (totals.requests, totals.refused) == (2, 2)


def test_a_model_is_asked_no_more_once_it_has_cost_what_it_may(
    tmp_path: Path, upstream: Upstream
) -> None:
    # Each answer names tokens; the request that goes over is the last one.
    once = ModelSpending()
    with running(tmp_path, upstream.url, spending=once) as ask:
        ask()
    totals = once.totals()
    cost = (totals.input_tokens * 3 + totals.output_tokens * 15) / 1e6
    assert cost > 0
    spending = ModelSpending(max_cost=1.5 * cost, prices=Prices(3, 15))
    with running(tmp_path, upstream.url, spending=spending) as ask:
        statuses = [ask()[0] for _ in range(4)]
        told = error(ask()[2])
    assert statuses == [200, 200, 403, 403]
    assert f"llm.max_cost of this run, {1.5 * cost:g} US dollars, is used up" in told


def test_tokens_of_a_cache_are_counted_apart_and_cost_too() -> None:
    spending = ModelSpending(max_cost=1.0, prices=Prices(2.0, 0.0))
    assert spending.admit() is None
    spending.add_tokens(100_000, 5, 400_000)
    assert spending.totals().cache_tokens == 400_000
    assert spending.admit() == "llm.max_cost of this run, 1 US dollars, is used up"
    assert spending.totals().refused == 1


def test_as_many_at_once_as_there_is_room_for(
    tmp_path: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "MAX_RUNNING", 1)
    arrived, go_on = threading.Event(), threading.Event()

    def wait(handler: BaseHTTPRequestHandler) -> None:
        arrived.set()
        assert go_on.wait(PATIENCE)
        answer_json(handler)

    upstream.answer = wait
    with running(tmp_path, upstream.url) as ask:
        statuses: list[int] = []
        first = threading.Thread(target=lambda: statuses.append(ask()[0]))
        first.start()
        assert arrived.wait(PATIENCE)
        assert ask()[0] == 429
        go_on.set()
        first.join(PATIENCE)
        assert statuses == [200]
        assert ask()[0] == 200, "there is room again"


def test_an_answer_that_breaks_off_is_no_whole_one(tmp_path: Path, upstream: Upstream) -> None:
    def half(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", "100")
        handler.end_headers()
        handler.wfile.write(b"half")
        handler.close_connection = True

    upstream.answer = half
    with (
        running(tmp_path, upstream.url) as ask,
        pytest.raises((http.client.IncompleteRead, ConnectionError)),
    ):
        ask()


def test_it_stops_while_the_model_says_nothing(tmp_path: Path, upstream: Upstream) -> None:
    arrived, over = threading.Event(), threading.Event()

    def silent(handler: BaseHTTPRequestHandler) -> None:
        arrived.set()
        over.wait(PATIENCE)

    upstream.answer = silent
    with running(tmp_path, upstream.url), contextlib.closing(Guest(tmp_path / "model")) as guest:
        guest.request("POST", "/v1/messages", b"{}", {"x-api-key": TOKEN})
        assert arrived.wait(PATIENCE)
    over.set()


def test_a_place_where_it_can_not_listen_is_named(tmp_path: Path) -> None:
    gateway = ModelGateway(ModelEndpoint("http://127.0.0.1:1", TOKEN), tmp_path / "no/model")
    with pytest.raises(GatewayError, match=r"can't listen on .*no/model"):
        gateway.start(PATIENCE)


# -- counting ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    stream=st.lists(st.sampled_from([*SSE, b'data: {"usage":9}\n', b"{", b"\xff\n"])).map(b"".join)
    | st.binary(max_size=200),
    cuts=st.lists(st.integers(1, 40), max_size=20),
)
def test_tokens_are_the_same_however_the_bytes_are_cut_up(stream: bytes, cuts: list[int]) -> None:
    at_once, in_pieces = TokenCount(), TokenCount()
    at_once.feed(stream)
    at_once.end()
    rest = stream
    for size in cuts:
        in_pieces.feed(rest[:size])
        rest = rest[size:]
    in_pieces.feed(rest)
    in_pieces.end()
    assert at_once.input_tokens == in_pieces.input_tokens
    assert at_once.output_tokens == in_pieces.output_tokens


def test_a_line_without_end_is_not_kept() -> None:
    count = TokenCount()
    for _ in range(4):
        count.feed(b"x" * MAX_LINE_BYTES)
    count.feed(b'{"usage":{"input_tokens":5}}')
    assert len(count._line) <= MAX_LINE_BYTES
    count.feed(b'\n{"usage":{"input_tokens":6}}')
    count.end()
    assert count.input_tokens == 6


def test_an_openai_response_is_counted_too() -> None:
    count = TokenCount()
    count.feed(b'data: {"response":{"usage":{"input_tokens":5,"output_tokens":true}}}\n\n')
    assert (count.input_tokens, count.output_tokens) == (5, 0)
