"""A running sidecar server for tests, and the submissions to send it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from voidbus.sidecar.event import SidecarEvent
from voidbus.sidecar.model import InboxEntry, InboxSnapshot, SidecarSnapshot
from voidbus.sidecar.server import Address, SidecarServer
from voidbus.sidecar.signals import Bounds
from voidbus.sidecar.state import Limits, SidecarState

RUN_ID = "run-7"


class RunningSidecar:
    """A server, where it listens, and what it reported."""

    def __init__(self, server: SidecarServer, events: list[SidecarEvent]) -> None:
        self.server = server
        self.events = events
        self.address: Address = ""

    @property
    def url(self) -> str:
        assert not isinstance(self.address, str)
        return f"http://{self.address[0]}:{self.address[1]}"

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def connect(self) -> socket.socket:
        family = socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(10)
            connection.connect(self.address)
        except OSError:
            connection.close()
            raise
        return connection

    def raw(self, request: bytes) -> tuple[int, bytes]:
        """Send bytes, read to the end: the status and the body of the last answer."""
        with self.connect() as connection:
            connection.sendall(request)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        while answer.startswith(b"HTTP/1.1 100"):
            answer = answer.partition(b"\r\n\r\n")[2]
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body

    def call(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, Any]:
        """One request; the status and the parsed body."""
        lines = [f"{method} {path} HTTP/1.1", "Host: sidecar"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        status, answer = self.raw("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        return status, json.loads(answer)

    def post(self, intents: Any, **headers: str) -> tuple[int, Any]:
        return self.call("POST", "/v1/intents", json.dumps(intents).encode(), **headers)


@contextmanager
def running_sidecar(
    listen: Address | Path = ("127.0.0.1", 0),
    limits: Limits | None = None,
    *,
    bounds: Bounds | None = None,
    snapshot: SidecarSnapshot | None = None,
) -> Iterator[RunningSidecar]:
    events: list[SidecarEvent] = []
    state = SidecarState(execution_id=RUN_ID, candidate_id=RUN_ID, limits=limits)
    if snapshot is not None:
        state.restore(snapshot)
    server = SidecarServer(
        state, run_id=RUN_ID, listen=listen, on_event=events.append, bounds=bounds
    )
    running = RunningSidecar(server, events)
    running.address = server.start(timeout=10)
    try:
        yield running
    finally:
        server.stop(timeout=10)


@contextmanager
def answering(answer: bytes, *, stay_open: bool = False) -> Iterator[str]:
    """A server that gives one connection these bytes."""
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)
            if stay_open:
                done.wait(20)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            done.set()
            thread.join(10)


def intent(payload: Any = "p", **changes: Any) -> dict[str, Any]:
    return {
        "kind": "signal",
        "audience": "broadcast",
        "payload": payload,
        "priority": "normal",
        **changes,
    }


def entry(message_id: str, payload: Any = None) -> InboxEntry:
    return InboxEntry(message_id=message_id, from_candidate_id="c", kind="signal", payload=payload)


def inbox(
    *message_ids: str, version: int | None = None, iteration: int = 1, payload: Any = None
) -> InboxSnapshot:
    return InboxSnapshot(
        version=version,
        execution_id="e",
        candidate_id="c",
        iteration=iteration,
        entries=tuple(entry(message_id, payload) for message_id in message_ids),
    )
