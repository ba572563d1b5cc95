"""Serves the API from a thread of its own: sockets, rights, deadlines, errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aiohttp import HttpVersion10, web

from voidbus.gateway.api import Api
from voidbus.gateway.patience import USUAL, Patience
from voidbus.gateway.problems import Code, Problem
from voidbus.gateway.protocol import HttpServer, failed
from voidbus.gateway.router import MAX_BODY, Call, Route, Router
from voidbus.gateway.routes import ROUTES
from voidbus.gateway.token import authorized
from voidbus.sidecar.connection import Connections
from voidbus.transport.node import Node

log = logging.getLogger("voidbus.gateway")
_http_log = logging.getLogger("voidbus.gateway.http")
# aiohttp logs a traceback for every malformed request, which would let clients fill our log.
_http_log.setLevel(logging.CRITICAL + 1)

_START_SECONDS = 5.0
# What answers under way may take to finish when the gateway stops.
_GOODBYE = 1.0
MAX_CONNECTIONS = 1024
"""Connections open at once, on all addresses together."""

# Of a header: a line, and their number.
_MAX_LINE = 16 * 1024
_MAX_HEADERS = 100


class GatewayError(Exception):
    """The server could not be started, or did not stop in time."""


@dataclass(frozen=True)
class Door:
    """A listening socket. Those without a `token` let everyone in who can connect."""

    listener: socket.socket
    token: str | None = None
    tls: ssl.SSLContext | None = None


class Server:
    """The API on some listening sockets, which stay its owner's."""

    def __init__(
        self,
        node: Node,
        doors: Sequence[Door],
        release: str,
        patience: Patience = USUAL,
    ) -> None:
        self._node = node
        self._patience = patience
        self._doors = doors
        self._release = release
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked: asyncio.Event | None = None
        self._stopping = False
        self._failure: BaseException | None = None

    def start(self) -> None:
        """Serve. Raises GatewayError."""
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="gateway-http", daemon=True
        )
        self._thread.start()
        if not ready.wait(_START_SECONDS) or self._failure is not None:
            raise GatewayError(f"the HTTP API did not start: {self._failure or 'it took too long'}")

    def stop(self, timeout: float) -> None:
        """Take no more requests, let answers under way finish for a second, join the thread."""
        thread = self._thread
        if thread is None:
            return
        self._stopping = True  # for a loop that is not up yet, and looks once it is
        if self._loop is not None and self._stop_asked is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._stop_asked.set)
        thread.join(timeout)
        if thread.is_alive():
            raise GatewayError(f"the HTTP API did not stop within {timeout:g} s")

    def _run(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._serve(ready))
        except BaseException as error:
            self._failure = error
            log.error("the HTTP API failed", exc_info=error)
        finally:
            ready.set()

    async def _serve(self, ready: threading.Event) -> None:
        self._stop_asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._stopping:
            return
        api = Api(self._node, self._release, self._patience)
        desk = _Desk(api, {door.listener.getsockname(): door.token for door in self._doors})
        http = HttpServer(
            desk,
            request_factory=desk.make_request,
            logger=_http_log,
            access_log=None,
            # Else a few kilobytes of gzip could become gigabytes here.
            auto_decompress=False,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_HEADERS,
            # What is asked of the bus for a client that has gone need not be waited for.
            handler_cancellation=True,
        )
        connections = desk.connections = Connections(
            http,
            limit=MAX_CONNECTIONS,
            deadline=self._patience.idle,
            stalled=self._patience.stalled,
        )
        for door in self._doors:
            connections.listen(door.listener, door.tls)
        ready.set()
        await self._stop_asked.wait()
        for door in self._doors:
            connections.stop_listening(door.listener)
        api.close()
        await http.shutdown(_GOODBYE)
        await connections.close(_GOODBYE)


class _Desk:
    """Takes requests: lets in who may, finds the handler, answers what goes wrong."""

    def __init__(self, api: Api, tokens: dict[Any, str | None]) -> None:
        self._api = api
        self._tokens = tokens
        self._router = Router(ROUTES)
        self._loop = asyncio.get_running_loop()
        self.connections: Connections | None = None

    def make_request(
        self,
        message: Any,
        payload: Any,
        protocol: Any,
        writer: Any,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        protocol.request_begins(payload)
        return web.BaseRequest(
            message, payload, protocol, writer, task, self._loop, client_max_size=MAX_BODY
        )

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        assert self.connections is not None
        transport = request.transport
        self.connections.cut_in(transport, None)
        began = time.monotonic()
        route = "none"
        response: web.StreamResponse
        try:
            found = self._find(request)
            if found is None:
                raise Problem(Code.NOT_FOUND, "route not found")
            matched, params = found
            route = matched.path
            response = await matched.handler(Call(self._api, request, params))
        except Problem as problem:
            response = problem.response()
        except web.HTTPRequestEntityTooLarge:
            # Clients expect no body with it.
            response = web.Response(status=413, reason="Payload Too Large")
            response.force_close()
        except (ConnectionError, asyncio.CancelledError):
            raise  # the client has gone
        except Exception:
            log.exception("%s %s failed", request.method, request.path[:200])
            response = failed().response()
        finally:
            self.connections.cut_in(transport, self._api.patience.idle)
        self._api.metrics.served(route, response.status, time.monotonic() - began)
        return response

    def _find(self, request: web.BaseRequest) -> tuple[Route, dict[str, str]] | None:
        if request.version < HttpVersion10:  # aiohttp serves HTTP/0.9, which has no headers
            raise Problem(Code.INVALID_PARAMS, "this is no HTTP request: send HTTP/1.1")
        self._check_token(request)
        path = request.raw_path.partition("?")[0]
        if not path.startswith("/"):  # as a proxy is asked: with the whole URL
            path = request.rel_url.raw_path
        return self._router.find(request.method, path)

    def _check_token(self, request: web.BaseRequest) -> None:
        """Raises Problem where the socket the request came by wants a token it has not got."""
        transport = request.transport
        if transport is None:
            raise ConnectionResetError
        token = self._token_of(transport)
        if token is not None and not authorized(request.headers.get("Authorization"), token):
            raise Problem(Code.UNAUTHORIZED, "missing or invalid bearer token")

    def _token_of(self, transport: asyncio.BaseTransport) -> str | None:
        name = transport.get_extra_info("sockname")
        if name in self._tokens:
            return self._tokens[name]
        # A listener on every address: the connection's own name has the one it was made to.
        for known, token in self._tokens.items():
            if isinstance(known, tuple) and isinstance(name, tuple) and known[1] == name[1]:
                return token
        raise Problem(Code.UNAUTHORIZED, "missing or invalid bearer token")
