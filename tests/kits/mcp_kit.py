"""Clients of void-mcp that know nothing: raw bytes on stdio and on HTTP, and a stuck sidecar."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from voidbus.mcp.http_server import HttpServer
from voidbus.sidecar.client import SidecarClient

PROGRAM = [sys.executable, "-m", "voidbus.mcp.void_mcp"]
VERSIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
STATELESS = "2026-07-28"
ENVELOPE = {
    "io.modelcontextprotocol/protocolVersion": STATELESS,
    "io.modelcontextprotocol/clientCapabilities": {},
}
INBOX = "void://inbox"


def message(method: str, request_id: int | str | None = None, **params: Any) -> dict[str, Any]:
    """A request, or without an id a notification."""
    body: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
    return body if request_id is None else {**body, "id": request_id}


def call(name: str, request_id: int | str = 1, /, **arguments: Any) -> dict[str, Any]:
    return message("tools/call", request_id, name=name, arguments=arguments)


class StdioMcp:
    """A process, and a line for a message."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self.input, self.output, self.errors = process.stdin, process.stdout, process.stderr

    def write(self, data: bytes) -> None:
        self.input.write(data)
        self.input.flush()

    def send(self, *messages: Any) -> None:
        self.write(b"".join(json.dumps(each).encode() + b"\n" for each in messages))

    def read(self) -> dict[str, Any]:
        return dict(json.loads(self.output.readline()))

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request and read its answer, which has to be what comes next."""
        self.send(body)
        answer = self.read()
        assert answer.get("id") == body["id"], answer
        return answer

    def end(self) -> tuple[int, bytes, bytes]:
        """Close the input; exit code, and what was still said."""
        self.input.close()
        rest, errors = self.output.read(), self.errors.read()
        return self.process.wait(20), rest, errors


@contextmanager
def stdio_mcp(
    url: str | None, *arguments: str, program: Sequence[str] = PROGRAM
) -> Iterator[StdioMcp]:
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    if url is not None:
        environment["VOID_SIDECAR_URL"] = url
    with subprocess.Popen(
        [*program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        # The test's own end, if it fails while one side waits for the other.
        guard = threading.Timer(45, process.kill)
        guard.start()
        try:
            yield StdioMcp(process)
        finally:
            process.kill()
            guard.cancel()
            guard.join()


class HttpMcp:
    """A server in this process, and raw requests to it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/mcp"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def raw(self, data: bytes, *, half_close: bool = True) -> bytes:
        """Send bytes, read to the end."""
        with self.connect() as connection:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while chunk := connection.recv(65536):
                    answer += chunk
            except ConnectionResetError:
                pass
            return answer

    def request(
        self, method: str, body: bytes = b"", path: str = "/mcp", **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request; status, headers in lower case, body."""
        named = {"Host": "127.0.0.1", "Connection": "close"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in named.items()),
        ]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        return parse(self.raw("\r\n".join([*lines, "", ""]).encode() + body, half_close=False))

    def post(self, body: Any, **headers: str) -> tuple[int, Any]:
        """POST some JSON; the status, and the parsed body if there is one."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", data, **headers)
        return status, json.loads(answer) if answer else None

    def initialize(self, version: str = VERSIONS[-1]) -> str:
        """Begin a session; its id."""
        body = json.dumps(message("initialize", 0, protocolVersion=version)).encode()
        status, headers, _ = self.request("POST", body)
        assert status == 200
        return headers["mcp-session-id"]


def parse(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in lines}
    return int(first.split()[1]), headers, body


@contextmanager
def http_mcp(url: str) -> Iterator[HttpMcp]:
    server = HttpServer(SidecarClient(url), 0)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield HttpMcp(server.port)
    finally:
        server.stop()
        thread.join(20)
    assert not thread.is_alive()


class Events:
    """Reads the server-sent events of an answer."""

    def __init__(self, connection: socket.socket) -> None:
        self.file = connection.makefile("rb")
        self.head = b""
        while (line := self.file.readline()) not in (b"\r\n", b""):
            self.head += line

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def next(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        data = None
        while line := self.file.readline():
            if line.startswith(b"data: "):
                data = json.loads(line[6:])
            elif line == b"\n" and data is not None:
                return dict(data)
        return None


class StuckSidecar:
    """Takes one request and never answers; `asked` and `left` say what its client does."""

    def __init__(self, listener: socket.socket) -> None:
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.asked = threading.Event()
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(listener,))
        self.thread.start()

    def _serve(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(30)
            try:
                connection.recv(65536)
                self.asked.set()
                while connection.recv(65536):
                    pass
            except OSError:
                pass
            self.left.set()


@contextmanager
def stuck_sidecar() -> Iterator[StuckSidecar]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        stuck = StuckSidecar(listener)
        try:
            yield stuck
        finally:
            listener.close()
            stuck.thread.join(40)


def folder_of_the_program() -> Path:
    import voidbus.mcp.void_mcp as module

    assert module.__file__
    return Path(module.__file__).parent
