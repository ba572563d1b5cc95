"""aiohttp's side of a connection, for clients that speak HTTP as void-box's daemon takes it."""

from __future__ import annotations

import asyncio
import logging
import re
import select
from typing import Any

from aiohttp import StreamReader, web

from voidbus.gateway.problems import Code, Problem

log = logging.getLogger("voidbus.gateway")

_LENGTH = re.compile(rb"\r\n(content-length|transfer-encoding)[ \t]*:", re.IGNORECASE)


class HttpServer(web.Server):
    """aiohttp's server, with connections of our own."""

    def __call__(self) -> HttpProtocol:
        return HttpProtocol(self, loop=self._loop, **self._kwargs)


class HttpProtocol(web.RequestHandler):
    """One connection. A client that has shut down its side of it gets its answers all the same, and
    what can't be read as HTTP gets an error like any other.

    `ended`: the client will send no more.
    """

    __slots__ = ("_begun", "_payload", "ended")

    def __init__(self, manager: web.Server, **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self.ended = False
        self._begun = False
        self._payload: StreamReader | None = None  # of the request that was begun last

    def data_received(self, data: bytes) -> None:
        begun, self._begun = self._begun, True
        super().data_received(data if begun else with_length(data))

    def request_begins(self, payload: StreamReader) -> None:
        """Told of every request, before it is handled."""
        self._payload = payload
        self._end_if_ended()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's own says bool | None
        """Whether the connection stays open, for the answers."""
        self.ended = True
        idle = self._waiter is not None and not self._messages
        # asyncio has no half-closed TLS connections.
        if idle or self.ssl_context is not None or _hung_up(self.transport):
            return False
        self._end_if_ended()
        return True

    def _end_if_ended(self) -> None:
        """Make the newest request the last one, and its body what has come of it."""
        if not self.ended or self._messages:
            return
        self.close()  # once it is answered
        if self._payload is not None and not self._payload.is_eof():
            self._payload.feed_eof()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            # That a client has gone is nobody's failure, and nobody reads the answer.
            if not isinstance(exc, ConnectionError):
                log.error("a request failed outside its handler", exc_info=exc)
            problem = failed()
        else:
            problem = Problem(Code.INVALID_PARAMS, "this is no HTTP request", status)
        response = problem.response()
        response.force_close()
        return response


def failed() -> Problem:
    """What a client is told of a fault of ours."""
    return Problem(Code.INTERNAL_ERROR, "the gateway failed; its log says how")


def has_ended(request: web.BaseRequest) -> bool:
    """Whether the client will send no more; it may have gone altogether."""
    protocol = request.protocol
    return isinstance(protocol, HttpProtocol) and protocol.ended


async def deliver(request: web.BaseRequest, response: web.Response) -> bool:
    """Send an answer; whether its client was there to take it. One that goes while the answer is
    under way to it is not noticed."""
    transport = request.transport
    if transport is None or _hung_up(transport):
        raise ConnectionResetError
    await response.prepare(request)
    await response.write_eof()
    # A TCP client that had closed, and not shut down its sending side only, has refused it.
    return not transport.is_closing() and not _polled(transport) & select.POLLERR


def with_length(data: bytes) -> bytes:
    """The first bytes of a connection, with the length of the body they have where none is said:
    void-box's daemon takes what came along with the head. All bodies are JSON objects, so that
    another request behind this one is not taken for one."""
    head, end, body = data.partition(b"\r\n\r\n")
    if not body.lstrip().startswith(b"{") or _LENGTH.search(head):
        return data
    return b"%s\r\nContent-Length: %d%s%s" % (head, len(body), end, body)


def _hung_up(transport: asyncio.BaseTransport | None) -> bool:
    """Whether the client has closed its socket, and not its sending side only. By TCP both look the
    same until something is sent."""
    return bool(_polled(transport) & select.POLLHUP)


def _polled(transport: asyncio.BaseTransport | None) -> int:
    """What has happened to a connection's socket, as poll(2) says; that it hung up, where there is
    none any more."""
    sock = None if transport is None else transport.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return select.POLLHUP
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return next((events for _, events in poll.poll(0)), 0)
