"""An HTTP client for tests of the API: answers as they are, raw bytes where those are the point."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 40.0
TERMINAL = ("run.finished", "run.failed", "run.cancelled")


@dataclass(frozen=True)
class Answer:
    """What came back. Header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"].partition(";")[0] == "application/json", self
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def problem(self) -> tuple[int, str, bool]:
        """Status, code and `retryable` of an error, whose body has nothing else but words."""
        body = self.json
        assert set(body) == {"code", "message", "retryable"}, body
        assert isinstance(body["message"], str)
        assert body["message"]
        return self.status, body["code"], body["retryable"]


class _Connection(http.client.HTTPConnection):
    """http.client on a socket that is connected already."""

    def __init__(self, connect: Callable[[], socket.socket], timeout: float) -> None:
        super().__init__("voidbus", timeout=timeout)
        self._connect_socket = connect

    def connect(self) -> None:
        self.sock = self._connect_socket()


@dataclass(frozen=True)
class HttpClient:
    """One door of an API: a Unix socket, or a TCP port with a bearer token."""

    where: Path | tuple[str, int]
    token: str | None = None
    tls: ssl.SSLContext | None = None
    timeout: float = PATIENCE

    # -- connections -----------------------------------------------------------------------

    def connect(self) -> socket.socket:
        """A connected socket."""
        if isinstance(self.where, Path):
            unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                # With a timeout it would not wait for room among those not accepted yet.
                unix.connect(str(self.where))
            except BaseException:
                unix.close()
                raise
            unix.settimeout(self.timeout)
            return unix
        plain = socket.create_connection(self.where, self.timeout)
        if self.tls is None:
            return plain
        try:
            return self.tls.wrap_socket(plain, server_hostname=self.where[0])
        except BaseException:
            plain.close()
            raise

    @contextlib.contextmanager
    def open(self) -> Iterator[http.client.HTTPConnection]:
        """A connection that stays open between requests."""
        connection = _Connection(self.connect, self.timeout)
        try:
            yield connection
        finally:
            connection.close()

    @property
    def auth(self) -> dict[str, str]:
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    # -- requests --------------------------------------------------------------------------

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """One request. A body that is no `bytes` is sent as JSON."""
        if connection is None:
            with self.open() as own:
                return self.ask(method, path, body, headers, connection=own)
        content: bytes | None
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, content, {**self.auth, **(headers or {})})
        response = connection.getresponse()
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, {k.replace("_", "-"): v for k, v in headers.items()})

    def post(self, path: str, body: object = None) -> Answer:
        return self.ask("POST", path, body)

    def put(self, path: str, body: object = None) -> Answer:
        return self.ask("PUT", path, body)

    def raw(self, data: bytes, *, shut: bool = False) -> bytes:
        """Send these bytes on a connection of their own; all that comes until it is closed.

        `shut`: send no more after them.
        """
        with self.connect() as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
                if shut:
                    sock.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := sock.recv(65536):
                    received += chunk
            return received

    def head_bytes(self, line: str, **headers: str) -> bytes:
        """A request's head with this first line, closing the connection after the answer."""
        given = {"Host": "voidbus", "Connection": "close", **self.auth, **headers}
        lines = [line, *(f"{name.replace('_', '-')}: {value}" for name, value in given.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    # -- runs ------------------------------------------------------------------------------

    def start(self, file: Path | str, **fields: object) -> str:
        """Start a run; its id."""
        answer = self.post("/v1/runs", {"file": str(file), **fields})
        assert answer.status == 200, answer
        return str(answer.json["run_id"])

    def run(self, run_id: str) -> dict[str, Any]:
        answer = self.get(f"/v1/runs/{run_id}")
        assert answer.status == 200, answer
        found: dict[str, Any] = answer.json
        return found

    def events(self, run_id: str) -> list[dict[str, Any]]:
        answer = self.get(f"/v1/runs/{run_id}/events")
        assert answer.status == 200, answer
        found: list[dict[str, Any]] = answer.json
        return found

    @contextlib.contextmanager
    def stream(self, run_id: str, query: str = "", **headers: str) -> Iterator[Iterator[Frame]]:
        """A run's events as they come."""
        with self.open() as connection:
            given = {**self.auth, **{k.replace("_", "-"): v for k, v in headers.items()}}
            connection.request("GET", f"/v1/runs/{run_id}/events/stream{query}", headers=given)
            response = connection.getresponse()
            assert response.status == 200, response.read()
            with response:
                yield frames(response)

    def wait_for(
        self, run_id: str, wanted: Callable[[dict[str, Any]], bool], patience: float = PATIENCE
    ) -> dict[str, Any]:
        """The first event that fits, whenever it comes."""
        seen: list[str] = []
        deadline = time.monotonic() + patience
        patient = HttpClient(self.where, self.token, self.tls, patience)
        with patient.stream(run_id) as stream:
            for frame in stream:
                seen.append(frame.event["event_type"])
                if wanted(frame.event):
                    return frame.event
                if time.monotonic() > deadline:
                    break
        raise AssertionError(f"run {run_id} never had that event; it had {seen}")

    def wait_type(self, run_id: str, *types: str, patience: float = PATIENCE) -> dict[str, Any]:
        return self.wait_for(run_id, lambda event: event["event_type"] in types, patience)

    def wait_log(self, run_id: str, text: str, patience: float = PATIENCE) -> dict[str, Any]:
        """Wait until a program of the run has printed this line."""
        return self.wait_for(
            run_id,
            lambda e: e["event_type"] == "log.chunk" and e["payload"]["data"].strip() == text,
            patience,
        )

    def wait_end(self, run_id: str, patience: float = PATIENCE) -> dict[str, Any]:
        """The run, once it has ended."""
        self.wait_type(run_id, *TERMINAL, patience=patience)
        return self.run(run_id)

    def finish(self, file: Path | str, **fields: object) -> dict[str, Any]:
        """Start a run and wait for its end."""
        return self.wait_end(self.start(file, **fields))


@dataclass(frozen=True)
class Frame:
    """One server-sent event."""

    id: str
    name: str
    event: dict[str, Any]


def frames(response: http.client.HTTPResponse) -> Iterator[Frame]:
    """The server-sent events of an answer, until its end; comments are passed over."""
    fields: dict[str, str] = {}
    while line := response.readline():
        text = line.decode().rstrip("\n")
        if text.startswith(":"):
            continue
        if text:
            name, _, value = text.partition(": ")
            fields[name] = value
        elif fields:
            yield Frame(fields["id"], fields["event"], json.loads(fields["data"]))
            fields = {}


def free_port() -> int:
    """A TCP port of the loopback nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
