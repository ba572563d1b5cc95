"""The sockets of void-mcp over HTTP: a listener on the loopback and a thread a connection."""

import contextlib
import os
import select
import socket
import threading
import time
from typing import Any

from voidbus.mcp.http_wire import (
    HttpFault,
    HttpRequest,
    RequestDecoder,
    event,
    response,
    stream_head,
)
from voidbus.mcp.jsonrpc import encode
from voidbus.mcp.link import Link
from voidbus.mcp.server import Work
from voidbus.mcp.streamable_http import Endpoint, Respond, Stream, refusal
from voidbus.mcp.versions import STATELESS
from voidbus.sidecar.client import SidecarClient

HOST = "127.0.0.1"

MAX_CONNECTIONS = 64
"""Connections at once; each has a thread."""

IDLE_SECONDS = 60.0
"""How long a connection waits for its next request."""

REQUEST_SECONDS = 10.0
"""How long a request may take to arrive, from its first byte."""

WRITE_SECONDS = 10.0
"""How long a client may take to read an answer."""

STREAM_SECONDS = 600.0
"""How long a stream lives; then its client opens it again, and nothing is lost between."""

HEARTBEAT_SECONDS = 15.0
STOP_SECONDS = 5.0

_BACKLOG = 64
_PAUSE = 0.5  # seconds before accepting again when there is no descriptor or no thread
_BUSY = HttpFault(503, "as many connections are open as there is room for; close one")


class HttpServer:
    """Serves until `stop`, which any thread or a signal's handler may call."""

    def __init__(self, client: SidecarClient, port: int) -> None:
        """Bind and listen. Raises OSError where the port is taken."""
        self._endpoint = Endpoint(client)
        self._listener = socket.create_server((HOST, port), backlog=_BACKLOG)
        self.port: int = self._listener.getsockname()[1]
        self._stopped = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._open: dict[threading.Thread, socket.socket] = {}

    def stop(self) -> None:
        """Make `run` return."""
        os.eventfd_write(self._stopped, 1)

    def run(self) -> None:
        """Accept connections until `stop`, then end them all."""
        try:
            with self._listener:
                self._accept()
        finally:
            self._close()

    def _accept(self) -> None:
        ready = select.poll()
        ready.register(self._listener, select.POLLIN)
        ready.register(self._stopped, select.POLLIN)
        self._listener.setblocking(False)
        while True:
            if any(descriptor == self._stopped for descriptor, _ in ready.poll()):
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError:  # no descriptor: the listener stays ready, so asking at once is no use
                select.select([self._stopped], [], [], _PAUSE)
                continue
            self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        connection.settimeout(WRITE_SECONDS)
        with contextlib.suppress(OSError):  # it may have gone already; its thread will find out
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
        with self._lock:
            room = len(self._open) < MAX_CONNECTIONS
            if room:
                self._open[thread] = connection
        if room:
            try:
                thread.start()
            except RuntimeError:  # the guest gives us no thread more
                with self._lock:
                    del self._open[thread]
            else:
                return
        with connection, contextlib.suppress(OSError):
            connection.sendall(response(_BUSY.status, refusal(_BUSY), keep_alive=False))

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                _Connection(connection, self._endpoint, self._stopped).serve()
        finally:
            with self._lock:
                self._open.pop(threading.current_thread(), None)

    def _close(self) -> None:
        self.stop()
        self._endpoint.close()
        deadline = time.monotonic() + STOP_SECONDS
        with self._lock:
            left = dict(self._open)
        for connection in left.values():
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RD)
        for thread in left:
            if thread.ident is not None:  # a signal may have come between its making and start
                thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in left):
            os.close(self._stopped)


class _Connection:
    """One connection, on its own thread."""

    def __init__(self, connection: socket.socket, endpoint: Endpoint, stopped: int) -> None:
        self._socket = connection
        self._endpoint = endpoint
        self._stopped = stopped
        self._decoder = RequestDecoder()

    def serve(self) -> None:
        """Answer requests until one side has enough. Raises OSError where the client has gone."""
        try:
            while (request := self._read()) is not None:
                answer = self._endpoint.answer(request, self._perform)
                if isinstance(answer, Stream):
                    self._stream(answer)
                    return
                keep = request.head.keep_alive and not answer.as_event
                self._socket.sendall(_written(answer, keep))
                if not keep:
                    return
        except HttpFault as fault:
            headers = {"Allow": "POST, GET, DELETE"} if fault.status == 405 else None
            self._socket.sendall(response(fault.status, refusal(fault), headers, keep_alive=False))
            self._linger()

    def _read(self) -> HttpRequest | None:
        """The next request; None when the client is done, or has been idle too long."""
        deadline = time.monotonic() + IDLE_SECONDS
        began = not self._decoder.is_empty
        while True:
            request = self._decoder.next()
            if request is not None:
                return request
            if self._decoder.wants_continue:
                self._decoder.wants_continue = False
                self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if not began and not self._decoder.is_empty:
                began = True
                deadline = time.monotonic() + REQUEST_SECONDS
            if not self._wait_for_input(deadline):
                if began:
                    raise HttpFault(408, f"no whole request came within {REQUEST_SECONDS:g} s")
                return None
            data = self._socket.recv(65536)
            if not data:
                return None
            self._decoder.feed(data)

    def _wait_for_input(self, deadline: float) -> bool:
        ready = select.poll()
        ready.register(self._socket, select.POLLIN)
        ready.register(self._stopped, select.POLLIN)
        remaining = max(0.0, deadline - time.monotonic())
        found = ready.poll(remaining * 1000)
        if any(descriptor == self._stopped for descriptor, _ in found):
            return False
        return bool(found)

    def _perform(self, link: Link, work: Work) -> list[dict[str, Any]]:
        if link.version not in STATELESS:
            return link.perform(work)
        # Since 2026-07-28 a client cancels by closing the connection, so that is watched for.
        told: list[dict[str, Any]] = []
        done = os.eventfd(0, os.EFD_CLOEXEC)

        def perform() -> None:
            told.extend(link.perform(work))
            os.eventfd_write(done, 1)

        worker = threading.Thread(target=perform, daemon=True)
        worker.start()
        try:
            ready = select.poll()
            ready.register(self._socket, select.POLLIN)
            ready.register(done, select.POLLIN)
            if done not in {each for each, _ in ready.poll()} and self._has_gone():
                link.cancel(work.id)
        finally:
            worker.join()  # within the timeouts of the sidecar's client
            os.close(done)
        return told

    def _has_gone(self) -> bool:
        return not self._socket.recv(1, socket.MSG_PEEK)

    def _stream(self, stream: Stream) -> None:
        outbox = stream.client.outbox
        bell = outbox.open()
        try:
            self._socket.sendall(stream_head())
            for body in stream.first:
                self._socket.sendall(event(encode(body)))
            self._follow(stream, bell)
        finally:
            if stream.is_own:
                stream.client.close()
            outbox.close(bell)

    def _follow(self, stream: Stream, bell: int) -> None:
        ready = select.poll()
        for each in (self._socket.fileno(), bell, self._stopped):
            ready.register(each, select.POLLIN)
        ends = time.monotonic() + STREAM_SECONDS
        while (remaining := ends - time.monotonic()) > 0:
            found = {each for each, _ in ready.poll(min(HEARTBEAT_SECONDS, remaining) * 1000)}
            if self._stopped in found:
                # Its work ended, a client who listens is owed an answer.
                for body in stream.client.link.close():
                    self._socket.sendall(event(encode(body)))
                return
            if self._socket.fileno() in found:
                return  # it has gone, or sends something, which is not for this connection
            if bell in found:
                os.eventfd_read(bell)
            told = stream.client.outbox.take(bell)
            if told is None:
                return
            for body in told:
                self._socket.sendall(event(encode(body)))
            if not found:
                self._socket.sendall(b":\n\n")

    def _linger(self) -> None:
        """Read on a little, so that a client who is still sending finds our answer and not a
        broken connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + 1.0
            while self._wait_for_input(deadline) and self._socket.recv(65536):
                pass


def _written(answer: Respond, keep: bool) -> bytes:
    if answer.as_event:
        return stream_head(answer.headers) + event(answer.body)
    return response(answer.status, answer.body, answer.headers, keep_alive=keep)
