"""Bounds what clients of an HTTP server can hold open: how many connections, and for how long."""

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import Callable

CONNECTION_DEADLINE = 15.0
"""Seconds a connection of a guest's lives at most. It carries one request, so this covers a slow
header, a slow body and a slow reader alike; the guest tools themselves give up after 10 s."""

MAX_CONNECTIONS = 64
"""Connections of a guest's open at once, at most."""

_ACCEPT_PAUSE = 1.0  # seconds to wait before accepting again when the process has no descriptor
_TLS_SECONDS = 10.0  # for a handshake

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
    """The open connections of one server, and the listeners they come from.

    A connection is cut `deadline` seconds after it was made, unless `cut_in` says otherwise, and
    one whose client has read nothing of what waits for it for `stalled` seconds.

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
        stalled: float | None = None,
    ) -> None:
        self.make_protocol = make_protocol
        self.limit = limit
        self.deadline = deadline
        self.stalled = stalled
        self._loop = asyncio.get_running_loop()
        self._open: dict[asyncio.BaseTransport, _BoundedConnection] = {}
        self._arriving: set[asyncio.Task[None]] = set()
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def listen(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept from a listening socket until `stop_listening`."""
        listener.setblocking(False)
        self._paused.pop(listener, None)
        self._loop.add_reader(listener, self._accept, listener, tls)

    def stop_listening(self, listener: socket.socket) -> None:
        """Accept no more; what has been accepted stays."""
        self._loop.remove_reader(listener)
        paused = self._paused.pop(listener, None)
        if paused is not None:
            paused.cancel()

    async def close(self, timeout: float) -> None:
        """Cut every connection that is open or on its way in; at most `timeout` seconds."""
        self._closed = True
        for connection in list(self._open.values()):
            connection.abort()
        if self._arriving:
            await asyncio.wait(self._arriving, timeout=timeout)
        await asyncio.sleep(0)  # lets aborted transports close their sockets

    def cut_in(self, transport: asyncio.BaseTransport | None, seconds: float | None) -> None:
        """Let a connection live so long from now, or without a deadline (None): for an answer that
        is meant to take its time.

        Nothing happens where it has gone already."""
        connection = self._open.get(transport) if transport is not None else None
        if connection is not None:
            connection.cut_in(seconds)

    def _accept(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        try:
            arrived, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError:
            # No descriptor or no memory: the listener stays readable, so asking at once again
            # would take the whole processor.
            self._loop.remove_reader(listener)
            again = self._loop.call_later(_ACCEPT_PAUSE, self.listen, listener, tls)
            self._paused[listener] = again
            return
        arrived.setblocking(False)
        task = self._loop.create_task(self._connect(arrived, tls))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)

    async def _connect(self, arrived: socket.socket, tls: ssl.SSLContext | None) -> None:
        # An OSError here means that the other side has gone already, or speaks no TLS.
        with contextlib.suppress(OSError):
            await self._loop.connect_accepted_socket(
                lambda: _BoundedConnection(self),
                arrived,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else _TLS_SECONDS,
            )

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
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._inner: asyncio.Protocol | None = None
        self._cut: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Cut it now."""
        if self._transport is not None:
            self._transport.abort()

    def cut_in(self, seconds: float | None) -> None:
        """Set the deadline anew, counted from now."""
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None
        if self._transport is not None and seconds is not None:
            self._cut = self._loop.call_later(seconds, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._connections.admit(transport, self):
            return
        self._transport = transport
        self.cut_in(self._connections.deadline)
        self._inner = self._connections.make_protocol()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def pause_writing(self) -> None:
        if self._connections.stalled is not None:
            self._stalled = self._loop.call_later(self._connections.stalled, self.abort)
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._cut, self._stalled):
            if timer is not None:
                timer.cancel()
        if self._transport is not None:
            self._connections.forget(self._transport)
            self._transport = None
        if self._inner is not None:
            self._inner.connection_lost(exc)
