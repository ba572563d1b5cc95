"""What void-mcp costs an agent: its start, a tool call's round trip, its memory.

Peer: the official MCP SDK's server with the same tool, asking the same sidecar.
Floor: `python -c pass` for the start; for a call, the same question put to the sidecar directly.
Reported: from execution to the answer to `initialize` on stdio, of the installed program and as a
guest runs it (no site-packages); from execution to serving over HTTP; one call of
`read_peer_messages` after the other on stdio, and on one HTTP connection; resident memory after
these calls.
Targets: the start within 150 ms; a call faster than the peer's; at most 25 MB resident.
How: all in turns. The client is a pipe and knows only lines, the same for both; the sidecar is a
thread of this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from kit.measure import installed, interleave, percentile, seconds, start_report

import voidbus.mcp.void_mcp as void_mcp
from voidbus.sidecar.client import SidecarClient
from voidbus.sidecar.model import InboxEntry, InboxSnapshot
from voidbus.sidecar.server import SidecarServer
from voidbus.sidecar.state import SidecarState

PATIENCE = 30.0
HELLO = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "bench", "version": "0"},
    },
}
READY: dict[str, object] = {"jsonrpc": "2.0", "method": "notifications/initialized"}
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "read_peer_messages", "arguments": {"since": 0}},
}

assert void_mcp.__file__
INSTALLED = [str(Path(sys.executable).with_name("void-mcp"))]
AS_IN_A_GUEST = [sys.executable, "-EsS", void_mcp.__file__]
PEER = [sys.executable, str(Path(__file__).with_name("peers") / "mcp_sdk_server.py")]


class Server:
    """A server on stdio that has been greeted."""

    def __init__(self, command: list[str], url: str) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "VOID_SIDECAR_URL": url},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        self.ask(HELLO)
        self.send(READY)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.input.close()
        self.process.wait(PATIENCE)
        self.output.close()

    def send(self, message: dict[str, object]) -> None:
        self.input.write(json.dumps(message).encode() + b"\n")
        self.input.flush()

    def ask(self, message: dict[str, object]) -> bytes:
        self.send(message)
        answer = self.output.readline()
        if b'"result"' not in answer:
            raise RuntimeError(f"{self.process.args!r} answered {answer[:300]!r}")
        return answer

    def resident(self) -> float:
        """Megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024 / 1e6


class HttpServer:
    """void-mcp over HTTP, and one connection to it."""

    def __init__(self, url: str) -> None:
        self.process = subprocess.Popen(
            [*INSTALLED, "--http", "--port", "0"],
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "VOID_SIDECAR_URL": url},
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline().decode()
        self.port = int(line.rpartition(":")[2].partition("/")[0])

    def __enter__(self) -> HttpServer:
        self.connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.stop()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def call(self) -> None:
        body = json.dumps(CALL).encode()
        head = b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.connection.sendall(head + body)
        answer = self.connection.recv(65536)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"void-mcp answered {answer[:300]!r}")


@contextlib.contextmanager
def a_sidecar() -> Iterator[str]:
    """Its URL. The inbox has three messages."""
    state = SidecarState(execution_id="bench", candidate_id="bench")
    entries = tuple(
        InboxEntry(
            message_id=f"m{number}",
            from_candidate_id="peer",
            kind="signal",
            payload={"summary_text": "an observation of some length, as agents write them"},
        )
        for number in range(3)
    )
    snapshot = InboxSnapshot(
        version=1, execution_id="bench", candidate_id="bench", iteration=1, entries=entries
    )
    state.load_inbox(snapshot)
    server = SidecarServer(state, run_id="bench", on_event=lambda _: None)
    address = server.start(PATIENCE)
    try:
        yield f"http://{address[0]}:{address[1]}"
    finally:
        server.stop(PATIENCE)


def start_times(url: str, rounds: int, with_peer: bool) -> dict[str, list[float]]:
    def started(command: list[str]) -> Callable[[], float]:
        def once() -> float:
            begun = time.perf_counter()
            with Server(command, url):
                return time.perf_counter() - begun

        return once

    def http() -> float:
        begun = time.perf_counter()
        server = HttpServer(url)
        took = time.perf_counter() - begun
        server.stop()
        return took

    jobs = {
        "python -c pass": lambda: seconds(
            lambda: subprocess.run([sys.executable, "-c", "pass"], check=True, timeout=PATIENCE)
        ),
        "void-mcp": started(INSTALLED),
        "void-mcp, as in a guest": started(AS_IN_A_GUEST),
        "void-mcp --http": http,
    }
    if with_peer:
        jobs["the SDK's server"] = started(PEER)
    return interleave(rounds, jobs)


def main() -> None:
    report, options = start_report(__file__, __doc__)
    rounds, calls = (2, 5) if options.quick else (20, 100)
    with_peer = installed("mcp") and installed("httpx2")
    if not with_peer:
        report.leave_out("the SDK's server")
    with a_sidecar() as url, contextlib.ExitStack() as stack:
        starts = start_times(url, rounds, with_peer)
        ours = stack.enter_context(Server(INSTALLED, url))
        http = stack.enter_context(HttpServer(url))
        client = SidecarClient(url)

        def each(job: Callable[[], object]) -> Callable[[], float]:
            return lambda: seconds(lambda: [job() for _ in range(calls)]) / calls

        jobs = {
            "the sidecar, asked directly": each(lambda: client.request("GET", "/v1/inbox?since=0")),
            "void-mcp": each(lambda: ours.ask(CALL)),
            "void-mcp, HTTP": each(http.call),
        }
        resident = {"void-mcp": ours}
        if with_peer:
            peer = stack.enter_context(Server(PEER, url))
            jobs["the SDK's server"] = each(lambda: peer.ask(CALL))
            resident["the SDK's server"] = peer
        trips = interleave(rounds, jobs)
        memory = {name: server.resident() for name, server in resident.items()}

    for name, times in starts.items():
        for share in (0.5, 0.99):
            value = percentile(times, share) * 1000
            report.figure(f"{name}: start to ready, p{share * 100:g} of {rounds}", value, "ms")
    for name, times in trips.items():
        report.figure(f"{name}: a call, median of {rounds}", median(times) * 1000, "ms")
    for name, megabytes in memory.items():
        report.figure(f"{name}: resident", megabytes, "MB")
    report.at_most("void-mcp: start to ready, p50, ms", median(starts["void-mcp"]) * 1000, 150.0)
    report.at_most("void-mcp: resident, MB", memory["void-mcp"], 25.0)
    if with_peer:
        ratio = median(trips["void-mcp"]) / median(trips["the SDK's server"])
        report.at_most("void-mcp: a call's ratio to the SDK's server's", ratio, 1.0)
    report.write(options.results)


if __name__ == "__main__":
    main()
