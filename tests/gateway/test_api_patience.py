"""What clients that take too long get, from a server with little patience."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_kit import HttpClient

from voidbus.gateway.patience import Patience
from voidbus.gateway.server import Door, Server
from voidbus.transport.access import inproc_endpoints
from voidbus.transport.hub import Hub

# Of one answer; enough of them fill any socket's buffers.
_ANSWERS = 400


@contextlib.contextmanager
def served(folder: Path, patience: Patience) -> Iterator[HttpClient]:
    """The API alone, with no supervisor behind it."""
    with contextlib.ExitStack() as stack:
        hub = Hub("supervisor", inproc_endpoints("patience"))
        stack.callback(hub.close)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(folder / "api"))
        listener.listen()
        server = Server(hub, [Door(listener)], "0", patience)
        server.start()
        stack.callback(server.stop, 10)
        yield HttpClient(folder / "api")


@pytest.mark.parametrize("method", ["POST /v1/runs", "PUT /v1/runs/r/inbox"])
def test_a_body_that_does_not_come_is_told_so_and_not_waited_for(
    tmp_path: Path, method: str
) -> None:
    with served(tmp_path, Patience(body=0.2)) as client, client.connect() as sock:
        sock.sendall(client.head_bytes(f"{method} HTTP/1.1", Content_Length="100") + b'{"fi')
        answer = sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"INVALID_PARAMS"' in answer.replace(b": ", b":")
    assert b"within 0.2 s" in answer


@pytest.mark.parametrize("begun", [b"", b"GET /v1/hea", b"GET /v1/health HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_that_asks_nothing_is_cut(tmp_path: Path, begun: bytes) -> None:
    with served(tmp_path, Patience(idle=0.2)) as client, client.connect() as sock:
        sock.sendall(begun)
        assert _rest(sock) == b""


def test_a_connection_is_kept_between_requests_and_not_for_ever(tmp_path: Path) -> None:
    with served(tmp_path, Patience(idle=0.5)) as client, client.connect() as sock:
        for _ in range(3):
            sock.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert _rest(sock) == b""


def test_a_client_that_does_not_read_its_answers_is_cut(tmp_path: Path) -> None:
    with served(tmp_path, Patience(stalled=0.2)) as client:
        whole = len(client.get("/openapi.json").body)
        with client.connect() as sock:
            sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * _ANSWERS)
            # It has cut us once it takes nothing more, whatever we read afterwards.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    sock.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * _ANSWERS)
            assert len(_rest(sock)) < whole * _ANSWERS
        assert client.get("/v1/health").status == 200


def _rest(sock: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    return received
