"""Bounds what clients can hold open: how many connections, for how long without a request, and how
long an answer may wait to be read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable

MAX_CONNECTIONS = 1024
"""Connections open at once on all addresses."""

IDLE_SECONDS = 75.0
"""How long a connection may be without a request under way: before the first, and between two."""

STALLED_SECONDS = 60.0
"""How long a client may read nothing of an answer that waits for it."""

_ACCEPT_PAUSE = 1.0  # before accepting again when there is no descriptor left

_BUSY_BODY = b'{"code":"TOO_MANY_REQUESTS","message":"too many connections","retryable":true}'
_BUSY = (
    b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s"
) % (len(_BUSY_BODY), _BUSY_BODY)


class Connections:
    """The open connections and the listeners they come from. Lives in one event loop."""

    def __init__(self, make_protocol: Callable[[], asyncio.Protocol]) -> None:
        self.make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self.open: dict[asyncio.BaseTransport, Connection] = {}
        self._arriving: set[asyncio.Task[None]] = set()
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._closed = False

    def listen(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        """Accept from a listening socket until `close`."""
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
        """Cut every connection that is open or on its way in."""
        self._closed = True
        for connection in list(self.open.values()):
            connection.abort()
        if self._arriving:
            await asyncio.wait(self._arriving, timeout=timeout)
        await asyncio.sleep(0)  # lets aborted transports close their sockets

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
                lambda: Connection(self),
                arrived,
                ssl=tls,
                ssl_handshake_timeout=10.0 if tls is not None else None,
            )

    def admit(self, transport: asyncio.Transport, connection: Connection) -> bool:
        """Count a connection in. Where there is no room for it, it is told so and closed."""
        if self._closed:
            transport.abort()
            return False
        if len(self.open) >= MAX_CONNECTIONS:
            transport.write(_BUSY)
            transport.close()
            return False
        self.open[transport] = connection
        return True


class Connection(asyncio.Protocol):
    """Hands a connection's bytes to the HTTP protocol, and cuts one that stalls."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._inner: asyncio.Protocol | None = None
        self._idle: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Cut it."""
        if self._transport is not None:
            self._transport.abort()

    def begin(self) -> None:
        """A request of it is being served."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def end(self) -> None:
        """No request of it is being served."""
        if self._transport is not None and self._idle is None:
            self._idle = self._loop.call_later(IDLE_SECONDS, self.abort)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if not self._connections.admit(transport, self):
            return
        self._transport = transport
        self._inner = self._connections.make_protocol()
        self._inner.connection_made(transport)
        self.end()

    def data_received(self, data: bytes) -> None:
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def pause_writing(self) -> None:
        self._stalled = self._loop.call_later(STALLED_SECONDS, self.abort)
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._idle, self._stalled):
            if timer is not None:
                timer.cancel()
        if self._transport is not None:
            self._connections.open.pop(self._transport, None)
            self._transport = None
        if self._inner is not None:
            self._inner.connection_lost(exc)
