"""Bounds what a hostile guest can hold open: how many connections, and for how long."""

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable

CONNECTION_DEADLINE = 15.0
"""Seconds a connection lives at most. It carries one request, so this covers a slow header, a
slow body and a slow reader alike; the guest tools themselves give up after 10 s."""

MAX_CONNECTIONS = 64
"""Connections open at once, at most."""

_ACCEPT_PAUSE = 1.0  # seconds to wait before accepting again when the process has no descriptor

_BUSY_BODY = json.dumps(
    {"code": "TOO_MANY_REQUESTS", "message": "too many connections", "retryable": True}
).encode()
_BUSY = (
    b"HTTP/1.1 429 Too Many Requests\r\n"
    b"Content-Type: application/json\r\n"
    b"Connection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s"
) % (len(_BUSY_BODY), _BUSY_BODY)


class Connections:
    """The open connections of one server, and the listener they come from.

    It accepts by itself: asyncio's Server loses a connection, descriptor and all, that is
    accepted in the same turn of the loop in which the server is closed. Lives in one event
    loop.
    """

    def __init__(
        self,
        make_protocol: Callable[[], asyncio.Protocol],
        *,
        limit: int = MAX_CONNECTIONS,
        deadline: float = CONNECTION_DEADLINE,
    ) -> None:
        self.make_protocol = make_protocol
        self.limit = limit
        self.deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._open: dict[asyncio.Transport, _BoundedConnection] = {}
        self._arriving: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def listen(self, listener: socket.socket) -> None:
        """Accept from a listening socket until `stop_listening`."""
        listener.setblocking(False)
        self._paused = None
        self._loop.add_reader(listener, self._accept, listener)

    def stop_listening(self, listener: socket.socket) -> None:
        """Accept no more; what has been accepted stays."""
        self._loop.remove_reader(listener)
        if self._paused is not None:
            self._paused.cancel()

    async def close(self, timeout: float) -> None:
        """Cut every connection that is open or on its way in; at most `timeout` seconds."""
        self._closed = True
        for transport in list(self._open):
            transport.abort()
        if self._arriving:
            await asyncio.wait(self._arriving, timeout=timeout)
        await asyncio.sleep(0)  # lets aborted transports close their sockets

    def _accept(self, listener: socket.socket) -> None:
        try:
            arrived, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            # No descriptor or no memory: the listener stays readable, so asking at once again
            # would take the whole processor.
            self._loop.remove_reader(listener)
            self._paused = self._loop.call_later(_ACCEPT_PAUSE, self.listen, listener)
            return
        arrived.setblocking(False)
        task = self._loop.create_task(self._connect(arrived))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _connect(self, arrived: socket.socket) -> None:
        # An OSError here means that the other side has gone already.
        with contextlib.suppress(OSError):
            await self._loop.connect_accepted_socket(lambda: _BoundedConnection(self), arrived)

    def prolong(self, transport: asyncio.BaseTransport | None, seconds: float) -> None:
        """Let a connection live so long from now; for an answer that is meant to take its time.

        Nothing happens where it has gone already."""
        connection = self._open.get(transport) if isinstance(transport, asyncio.Transport) else None
        if connection is not None:
            connection.cut_in(seconds)

    def admit(self, transport: asyncio.Transport, connection: "_BoundedConnection") -> bool:
        """Count a connection in. Where there is no room for it, it is told so and closed."""
        if self._closed:
            transport.abort()
            return False
        if len(self._open) >= self.limit:
            transport.write(_BUSY)
            transport.close()
            return False
        self._open[transport] = connection
        return True

    def forget(self, transport: asyncio.Transport) -> None:
        """Count a connection out."""
        self._open.pop(transport, None)


class _BoundedConnection(asyncio.Protocol):
    """Hands a connection's bytes to the HTTP protocol, and cuts it at its deadline."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._inner: asyncio.Protocol | None = None
        self._cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._connections.admit(transport, self):
            return
        self._transport = transport
        self.cut_in(self._connections.deadline)
        self._inner = self._connections.make_protocol()
        self._inner.connection_made(transport)

    def cut_in(self, seconds: float) -> None:
        """Set the deadline anew, counted from now."""
        if self._cut is not None:
            self._cut.cancel()
        if self._transport is not None:
            loop = asyncio.get_running_loop()
            self._cut = loop.call_later(seconds, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def pause_writing(self) -> None:
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._cut is not None:
            self._cut.cancel()
        if self._transport is not None:
            self._connections.forget(self._transport)
        if self._inner is not None:
            self._inner.connection_lost(exc)
