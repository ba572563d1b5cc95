"""A client that asks over a Unix socket as fast as it is answered, and one that listens."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

ANSWER_SECONDS = 60.0


class Connection:
    """One connection that is kept: a request after the answer to the one before."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_unix_connection(self._path)

    async def ask(self, method: str, target: str, body: Any = None) -> tuple[int, bytes]:
        """The status and the body of an answer that has its length."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        self._writer.write(head.encode() + content)
        async with asyncio.timeout(ANSWER_SECONDS):
            answer = (await self._reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
            return int(answer[9:12]), await self._reader.readexactly(length)

    async def listen(self, target: str) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Server-sent events: (nanoseconds since the epoch at which it came, the event)."""
        self._writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await self._reader.readuntil(b"\r\n\r\n")
        while True:
            async with asyncio.timeout(ANSWER_SECONDS):
                line = await self._reader.readline()
            if line.startswith(b"data: "):
                yield time.time_ns(), json.loads(line[6:])
            elif not line:
                return

    def close(self) -> None:
        self._writer.close()


@dataclass
class Load:
    """What some clients together got done."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds


async def load(path: str, targets: Sequence[str], clients: int, requests: int) -> Load:
    """`requests` in all, for the targets in turn, by `clients` that each ask one at a time."""
    connections = [Connection(path) for _ in range(clients)]
    for connection in connections:
        await connection.open()
    done = Load()
    wanted = itertools.islice(itertools.cycle(targets), requests)

    async def ask(connection: Connection) -> None:
        for target in wanted:
            began = time.perf_counter()
            status, _ = await connection.ask("GET", target)
            done.latencies.append(time.perf_counter() - began)
            if status != 200:
                raise RuntimeError(f"{target} was answered with {status}")

    began = time.perf_counter()
    await asyncio.gather(*(ask(connection) for connection in connections))
    done.seconds = time.perf_counter() - began
    for connection in connections:
        connection.close()
    return done
