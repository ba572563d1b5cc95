"""A run's events: all of them, as they come, and its log."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

from aiohttp import web

from voidbus.actors.messages.runs import InspectRun, RawEvents, ReadRawEvents, RunState
from voidbus.gateway.bus import Bus
from voidbus.gateway.feed import JOURNAL, FeedEvent
from voidbus.gateway.problems import Code, Problem
from voidbus.gateway.protocol import has_ended
from voidbus.gateway.router import Call
from voidbus.gateway.spooled import Spooled

# Of a stream nothing is sent on: a comment, so that proxies and clients know that it lives.
_KEEP_ALIVE = b": nothing new\n\n"
_LOG_EVENT = "log.chunk"


def wants_v2(call: Call) -> bool:
    """Whether events are to bear their second name."""
    return call.query("api_version") == "v2"


def renamed(line: bytes) -> bytes:
    """An event with its second name in place of the first."""
    event = json.loads(line)
    event["event_type"] = event["event_type_v2"]
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()


async def read_from(bus: Bus, first: ReadRawEvents) -> AsyncIterator[bytes]:
    """All events from there on that the journal has now, a line each, a page at a time. Raises
    Problem."""
    read = first
    while True:
        page, (text, *_) = await bus.read(JOURNAL, read, RawEvents)
        if text:
            yield text
        if not text or page.last >= page.last_seq:
            return
        read = first.model_copy(update={"after": page.last, "after_id": None})


class EventJson:
    """Puts pages of events together to one array."""

    def __init__(self, *, v2: bool) -> None:
        self._v2 = v2
        self._first = True

    def page(self, lines: bytes) -> bytes:
        if not lines:
            return b""
        if self._v2:
            joined = b",".join(renamed(line) for line in lines.split(b"\n"))
        else:
            joined = lines.replace(b"\n", b",")
        before, self._first = b"" if self._first else b",", False
        return before + joined


async def events(call: Call) -> web.StreamResponse:
    run_id = call.params["run_id"]
    first = ReadRawEvents(run_id=run_id, after_id=call.query("from_event_id"))
    pages = EventJson(v2=wants_v2(call))
    with Spooled() as spooled:
        spooled.write(b"[")
        async for page in read_from(call.api.bus, first):
            spooled.write(pages.page(page))
        spooled.write(b"]")
        return await spooled.send(call.request)


# -- as they come ------------------------------------------------------------------------------


async def stream(call: Call) -> web.StreamResponse:
    """Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    run_id = call.params["run_id"]
    last = call.header("Last-Event-ID") or call.query("from_event_id")
    after = await _seq_after(call.api.bus, run_id, last)
    response = await _begin(call.request, "text/event-stream")
    if call.request.method == "HEAD":
        return response
    v2 = wants_v2(call)
    async with contextlib.aclosing(call.api.feeds.follow(run_id, after)) as feed:
        async for some in feed:
            await response.write(b"".join(_sse(event, v2=v2) for event in some) or _KEEP_ALIVE)
    await response.write_eof()
    return response


def _sse(event: FeedEvent, *, v2: bool) -> bytes:
    body = renamed(event.body) if v2 else event.body
    return b"id: %s\nevent: run-event\ndata: %s\n\n" % (event.event_id.encode(), body)


async def _seq_after(bus: Bus, run_id: str, event_id: str | None) -> int:
    """The seq behind which to go on. Raises Problem for an unknown run."""
    if not event_id:
        await bus.get(JOURNAL, InspectRun(run_id=run_id), RunState)
        return -1
    read = ReadRawEvents(run_id=run_id, after_id=event_id, limit=1)
    page, (text, *_) = await bus.read(JOURNAL, read, RawEvents)
    return page.last - 1 if text else page.last_seq


async def _begin(request: web.BaseRequest, content_type: str) -> web.StreamResponse:
    """An answer without a known end."""
    response = web.StreamResponse()
    response.content_type = content_type
    if content_type.startswith("text/"):
        response.charset = "utf-8"
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold it back
    await response.prepare(request)
    return response


# -- the log -----------------------------------------------------------------------------------


async def logs(call: Call) -> web.StreamResponse:
    run_id = call.params["run_id"]
    stage, wanted = call.query("stage"), call.query("stream")
    if wanted not in (None, "stdout", "stderr"):
        raise Problem(Code.INVALID_PARAMS, f"stream is stdout or stderr, not {wanted[:40]!r}")
    chosen = _Chosen(stage, wanted)
    if call.query("follow") in ("true", "1"):
        return await _follow_log(call, run_id, chosen)
    with Spooled() as spooled:
        read = ReadRawEvents(run_id=run_id, stream=wanted or "*")
        async for page in read_from(call.api.bus, read):
            spooled.write(b"".join(chosen.line(line) for line in page.split(b"\n")))
        return await spooled.send(call.request, "text/plain")


async def _follow_log(call: Call, run_id: str, chosen: _Chosen) -> web.StreamResponse:
    await call.api.bus.get(JOURNAL, InspectRun(run_id=run_id), RunState)
    response = await _begin(call.request, "text/plain")
    if call.request.method == "HEAD":
        return response
    async with contextlib.aclosing(call.api.feeds.follow(run_id, -1)) as feed:
        async for some in feed:
            lines = b"".join(
                chosen.line(event.body) for event in some if event.event_type == _LOG_EVENT
            )
            if lines:
                await response.write(lines)
            elif not some and has_ended(call.request):
                break  # it may have gone altogether, which only writing would show
    await response.write_eof()
    return response


class _Chosen:
    """Which lines of a log are wanted."""

    def __init__(self, stage: str | None, stream: str | None) -> None:
        self._stage = stage
        self._stream = stream

    def line(self, body: bytes) -> bytes:
        """A line of the log, or nothing."""
        event = json.loads(body)
        if event["event_type"] != _LOG_EVENT:
            return b""
        if self._stage is not None and event["stage_name"] != self._stage:
            return b""
        if self._stream is not None and event["stream"] != self._stream:
            return b""
        return f"{event['message']}\n".encode(errors="replace")
