"""The way from a guest to its model: adds the key, which the guest never has.

A reverse proxy on a Unix socket, which a port of the guest's is forwarded to. It passes requests on
to one endpoint only, with the guest's own credentials taken away, and answers as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
from aiohttp import web
from yarl import URL

from voidbus.sidecar.connection import Connections
from voidbus.sidecar.model_endpoint import ModelEndpoint
from voidbus.sidecar.token_count import TokenCount

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Of a request; the Messages API takes no more (its documentation, "Errors")."""

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Of an answer."""

MAX_RUNNING = 16
"""Requests under way at once."""

REQUEST_SECONDS = 900.0
"""How long a request may take, from its first byte to the answer's last."""

SILENCE_SECONDS = 300.0
"""How long the model may say nothing."""

_CONNECT_SECONDS = 15.0
_BACKLOG = 64
_GOODBYE = 1.0  # seconds that answers under way may take to finish when the gateway stops
_METHODS = ("GET", "HEAD", "POST")
# Headers that are of one connection only (RFC 9110, section 7.6.1), that say who asks, or that
# are written anew.
_NOT_PASSED = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"),
        *("upgrade", "host", "content-length", "accept-encoding", "expect"),
        *("authorization", "x-api-key", "api-key", "cookie", "proxy-authorization", "forwarded"),
    }
)
_NOT_RETURNED = frozenset(
    {
        *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding"),
        *("upgrade", "content-length", "content-encoding", "set-cookie", "location"),
        "proxy-authenticate",
    }
)

_http_log = logging.getLogger("voidbus.sidecar.http")
# aiohttp logs a traceback for every malformed request, which would let a guest fill our log.
_http_log.setLevel(logging.CRITICAL + 1)


class GatewayError(Exception):
    """The gateway could not be started, or did not stop in time."""


class _Refused(Exception):
    """A request that is answered here."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class ModelGateway:
    """Serves one machine from a thread of its own, on the Unix socket `path`."""

    def __init__(self, endpoint: ModelEndpoint, path: Path) -> None:
        self._endpoint = endpoint
        self._path = path
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_asked: asyncio.Event | None = None
        self._ready = threading.Event()

    def start(self, timeout: float) -> None:
        """Listen and serve. Raises GatewayError."""
        try:
            listener = _bind(self._path)
        except OSError as error:
            raise GatewayError(
                f"the model gateway can't listen on {self._path}: {error}"
            ) from error
        self._thread = threading.Thread(
            target=self._run, args=(listener,), name="model-gateway", daemon=True
        )
        self._thread.start()
        if not self._ready.wait(timeout):
            raise GatewayError(f"the model gateway was not serving after {timeout:g} s")

    def stop(self, timeout: float) -> None:
        """End what is under way and join the thread. Raises GatewayError where it does not end."""
        thread = self._thread
        if thread is None:
            return
        if self._loop is not None and self._stop_asked is not None:
            # RuntimeError: the loop has ended already.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop_asked.set)
        thread.join(timeout)
        if thread.is_alive():
            raise GatewayError(f"the model gateway did not stop within {timeout:g} s")
        self._path.unlink(missing_ok=True)

    def _run(self, listener: socket.socket) -> None:
        with listener:
            asyncio.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._stop_asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        timeout = aiohttp.ClientTimeout(
            total=REQUEST_SECONDS, sock_connect=_CONNECT_SECONDS, sock_read=SILENCE_SECONDS
        )
        # No cookies are kept, no proxy or credentials are taken from the environment.
        jar = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(
            timeout=timeout, cookie_jar=jar, auto_decompress=False
        ) as session:
            http = web.Server(
                _Proxy(self._endpoint, session),
                logger=_http_log,
                access_log=None,
                auto_decompress=False,
                handler_cancellation=True,
            )
            connections = Connections(http, deadline=REQUEST_SECONDS)
            connections.listen(listener)
            self._ready.set()
            await self._stop_asked.wait()
            connections.stop_listening(listener)
            await http.shutdown(_GOODBYE)
            await connections.close(_GOODBYE)


class _Proxy:
    """Handles the requests of one gateway."""

    def __init__(self, endpoint: ModelEndpoint, session: aiohttp.ClientSession) -> None:
        self._endpoint = endpoint
        self._session = session
        self._base = endpoint.base_url.rstrip("/")
        self._running = 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            url = self._admit(request)
        except _Refused as refused:
            return _error(refused.status, refused.kind, str(refused))
        self._running += 1
        try:
            return await self._pass_on(request, url)
        except (aiohttp.ClientError, TimeoutError) as error:
            # Its words may name the address, never a header.
            why = str(error) or type(error).__name__
            return _error(502, "api_error", f"the model can't be reached: {why}")
        finally:
            self._running -= 1

    def _admit(self, request: web.BaseRequest) -> URL:
        """Where a request goes. Raises _Refused for one that is not passed on."""
        if not hmac.compare_digest(_shown(request).encode(), self._endpoint.token.encode()):
            raise _Refused(401, "authentication_error", "this is not the key this guest was given")
        path = request.raw_path
        plain = path.partition("?")[0].lower()
        if not path.startswith("/") or ".." in plain or "%2e" in plain or "\\" in plain:
            raise _Refused(400, "invalid_request_error", "the path is not one of the model's")
        if request.method not in _METHODS:
            raise _Refused(405, "invalid_request_error", "only GET, HEAD and POST are passed on")
        size = request.content_length
        if request.method == "POST" and size is None:
            raise _Refused(411, "invalid_request_error", "a request needs its Content-Length")
        if size is not None and size > MAX_BODY_BYTES:
            raise _Refused(413, "request_too_large", f"a request is over {MAX_BODY_BYTES} bytes")
        if self._running >= MAX_RUNNING:
            raise _Refused(429, "rate_limit_error", f"{MAX_RUNNING} requests are under way already")
        spending = self._endpoint.spending
        counts = request.method == "POST" and not plain.endswith("/count_tokens")
        used_up = spending.admit() if counts else None
        if used_up is not None:
            # Not 429, which clients try again and again.
            raise _Refused(403, "permission_error", used_up)
        return URL(self._base + path, encoded=True)

    async def _pass_on(self, request: web.BaseRequest, url: URL) -> web.StreamResponse:
        headers = [(n, v) for n, v in request.headers.items() if n.lower() not in _NOT_PASSED]
        # As it is, or its tokens could not be counted.
        headers.append(("Accept-Encoding", "identity"))
        if self._endpoint.key:
            own = ("Authorization", f"Bearer {self._endpoint.key}")
            headers.append(own if self._endpoint.bearer else ("x-api-key", self._endpoint.key))
        data = None
        if request.content_length:
            headers.append(("Content-Length", str(request.content_length)))
            data = _body(request)
        async with self._session.request(
            request.method,
            url,
            headers=headers,
            data=data,
            # Elsewhere the key has no business.
            allow_redirects=False,
        ) as answer:
            return await self._return(request, answer)

    async def _return(
        self, request: web.BaseRequest, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        headers = [(n, v) for n, v in answer.headers.items() if n.lower() not in _NOT_RETURNED]
        response = web.StreamResponse(status=answer.status)
        response.headers.extend(headers)
        response.force_close()
        count, left = TokenCount(), MAX_ANSWER_BYTES
        try:
            await response.prepare(request)
            async for data in answer.content.iter_any():
                left -= len(data)
                if left < 0:
                    raise aiohttp.ClientPayloadError(f"over {MAX_ANSWER_BYTES} bytes")
                count.feed(data)
                await response.write(data)
            await response.write_eof()
        except ConnectionError:  # the guest has gone
            return response
        except (aiohttp.ClientError, TimeoutError):  # the answer breaks off: so does ours
            if request.transport is not None:
                request.transport.abort()
        finally:
            count.end()
            self._endpoint.spending.add_tokens(
                count.input_tokens, count.output_tokens, count.cache_tokens
            )
        return response


async def _body(request: web.BaseRequest) -> AsyncIterator[bytes]:
    async for data in request.content.iter_any():
        yield data


def _shown(request: web.BaseRequest) -> str:
    """What the guest shows for a key."""
    kind, _, bearer = request.headers.get("Authorization", "").partition(" ")
    return request.headers.get("x-api-key") or (bearer if kind.lower() == "bearer" else "")


def _error(status: int, kind: str, message: str) -> web.Response:
    """As the Messages API words its errors."""
    body = {"type": "error", "error": {"type": kind, "message": f"voidbus: {message}"}}
    response = web.Response(status=status, text=json.dumps(body), content_type="application/json")
    response.force_close()
    return response


def _bind(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        # Nobody can connect before listen(), so the permissions are in force for everyone.
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)  # noqa: PTH101 - the pair of bind(path)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
