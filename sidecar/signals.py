"""`GET /v1/signals`: new entries of the inbox, to whoever waits for them.

Two forms. A *long poll* is answered as soon as there is something new, or at its timeout with
nothing. A *stream* of server-sent events
(https://html.spec.whatwg.org/multipage/server-sent-events.html) gives everything new as it
comes. Neither queues: what a follower has missed is read from the inbox by the version it has
seen, so a slow one costs no more memory than its socket.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from aiohttp import web

from voidbus.sidecar.model import InboxView, Rejected, too_many

MAX_WAITING = 16
"""Followers at once, at most: a part of the connections, so that other requests find room."""

DEFAULT_POLL = 25.0
"""Seconds a long poll waits that names no timeout."""

MAX_POLL = 60.0
"""Seconds a long poll waits at most."""

MAX_STREAM = 600.0
"""Seconds a stream lives; then its client connects again and goes on where it was."""

HEARTBEAT = 15.0
"""Seconds of silence after which a stream sends a comment, so that a dead client is noticed."""

SLOW = 10.0
"""Seconds a client may take to read what it is sent; then it is told so and dropped."""

_LAST_WORDS = 5.0  # seconds a connection keeps for its answer's end


class Inbox(Protocol):
    """What a follower is told from. Must return at once."""

    def news(self, since: int | None) -> InboxView | None: ...
    def inbox(self, since: int | None = None) -> InboxView: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many may follow, and for how long; seconds."""

    waiting: int = MAX_WAITING
    poll: float = MAX_POLL
    stream: float = MAX_STREAM
    heartbeat: float = HEARTBEAT
    slow: float = SLOW


class Signals:
    """Who follows the inbox, and the bell that wakes them. Lives in one event loop."""

    def __init__(
        self,
        inbox: Inbox,
        prolong: Callable[[asyncio.BaseTransport | None, float], None],
        bounds: Bounds | None = None,
    ) -> None:
        self._inbox = inbox
        self._prolong = prolong
        self._bounds = bounds or Bounds()
        self._bell = asyncio.Event()
        self._waiting = 0
        self._closed = False

    def __len__(self) -> int:
        return self._waiting

    def ring(self) -> None:
        """The inbox has changed: all who wait look again."""
        self._bell.set()
        self._bell = asyncio.Event()

    def close(self) -> None:
        """All who wait are answered with what there is."""
        self._closed = True
        self.ring()

    async def poll(
        self, request: web.BaseRequest, since: int | None, timeout: float | None
    ) -> web.Response:
        """The news since a version, as soon as there are any; at the timeout, the inbox's header
        without entries. Raises Rejected (429) where too many wait."""
        seconds = min(DEFAULT_POLL if timeout is None else timeout, self._bounds.poll)
        with self._counted():
            self._prolong(request.transport, seconds + self._bounds.slow)
            view = await self._next(since, seconds)
        return web.Response(
            body=(view or self._inbox.inbox(since)).model_dump_json().encode(),
            content_type="application/json",
        )

    async def stream(self, request: web.BaseRequest, since: int | None) -> web.StreamResponse:
        """News as they come, an event for each change, its id the inbox's version.

        Raises Rejected (429) where too many wait. A client that does not read is told so, by
        an event it finds when it does, and dropped.
        """
        with self._counted():
            bounds = self._bounds
            self._prolong(request.transport, bounds.stream + bounds.slow + _LAST_WORDS)
            response = web.StreamResponse(headers={"Cache-Control": "no-store"})
            response.content_type = "text/event-stream"
            response.force_close()
            await response.prepare(request)
            try:
                reason = await self._follow(response, since)
            except TimeoutError:
                reason = f"this client did not read within {bounds.slow:g} s"
            self._prolong(request.transport, _LAST_WORDS)
            # At once or never: a full connection takes the words, but is not waited for.
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(0):
                    await response.write(_end(reason))
            return response

    async def _follow(self, response: web.StreamResponse, since: int | None) -> str:
        """Send events until the stream's end; why it ended. Raises TimeoutError for a client
        that does not read."""
        bounds = self._bounds
        loop = asyncio.get_running_loop()
        ends = loop.time() + bounds.stream
        while (remaining := ends - loop.time()) > 0:
            view = await self._next(since, min(bounds.heartbeat, remaining))
            if view is not None:
                since = view.version
            elif self._closed:
                return "the sidecar is stopping"
            async with asyncio.timeout(bounds.slow):
                await response.write(b":\n\n" if view is None else _event(view))
        return "the stream has reached its age; connect again"

    async def _next(self, since: int | None, seconds: float) -> InboxView | None:
        """The news, waited for so long at most; None where none came."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while True:
            bell = self._bell  # before looking: what changes after it rings this one
            view = self._inbox.news(since)
            if view is not None or self._closed or loop.time() >= deadline:
                return view
            try:
                async with asyncio.timeout_at(deadline):
                    await bell.wait()
            except TimeoutError:
                return self._inbox.news(since)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        if self._waiting >= self._bounds.waiting:
            raise Rejected(
                too_many(
                    f"{self._waiting} clients follow the inbox already, and that is the limit; "
                    "end one, or poll /v1/inbox?since=VERSION"
                )
            )
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1


def _event(view: InboxView) -> bytes:
    # JSON has no line breaks outside strings, and escapes them inside: one data line holds it.
    data = view.model_dump_json().encode()
    return b"event: inbox\nid: %d\ndata: %s\n\n" % (view.version, data)


def _end(reason: str) -> bytes:
    return b'event: end\ndata: {"reason":"%s"}\n\n' % reason.encode()
