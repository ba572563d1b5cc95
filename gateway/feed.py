"""Events as they come, for as many followers as there are: each is read and encoded once.

A follower reads from what the feed holds; one that has fallen behind, or comes in the middle,
reads the journal until it has caught up. So a slow client holds nothing up and loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from voidbus.actors.messages.runs import (
    TERMINAL_EVENTS,
    EventPublished,
    RawEvents,
    ReadRawEvents,
    RunEvent,
    events_topic,
)
from voidbus.gateway.bus import Bus
from voidbus.gateway.problems import Code, Problem
from voidbus.transport.topics import Publication

JOURNAL = "supervisor/journal"

# What a feed holds of one run's newest events, for followers that keep up.
_HELD_EVENTS = 2000
_HELD_BYTES = 4 * 1024 * 1024
# A follower looks into the journal this often though nothing was published: a publication may be
# lost, and what ended a run while nobody followed is told by the journal only (seconds).
_LOOK_SECONDS = 5.0
_PAGE = 500


@dataclass(frozen=True)
class FeedEvent:
    """One event, as JSON and as far as following needs it."""

    seq: int
    event_id: str
    event_type: str
    stream: str | None
    body: bytes

    @classmethod
    def of(cls, event: RunEvent, body: bytes) -> FeedEvent:
        return cls(event.seq, event.event_id, event.event_type, event.stream, body)


class _Feed:
    """One run's newest events."""

    def __init__(self) -> None:
        self.events: deque[FeedEvent] = deque()
        self.size = 0
        self.followers = 0
        self.changed = asyncio.Event()

    def add(self, event: FeedEvent) -> None:
        if self.events and event.seq != self.events[-1].seq + 1:
            self.events.clear()  # something was lost between: the journal has it
            self.size = 0
        self.events.append(event)
        self.size += len(event.body)
        while len(self.events) > _HELD_EVENTS or self.size > _HELD_BYTES:
            self.size -= len(self.events.popleft().body)
        self.wake()

    def wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    def after(self, seq: int) -> list[FeedEvent] | None:
        """What follows `seq`; None where the feed no longer, or does not yet, reach back so far."""
        if not self.events or self.events[0].seq > seq + 1:
            return None
        return list(self.events)[max(0, seq + 1 - self.events[0].seq) :]


class Feeds:
    """The feeds of all runs somebody follows. Lives in one event loop."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self._feeds: dict[str, _Feed] = {}
        self._pending: deque[tuple[str, FeedEvent]] = deque()
        self._subscription = bus.node.subscribe(events_topic(""), self._published)
        self._scheduled = False

    @property
    def followers(self) -> int:
        """Clients that follow a run now."""
        return sum(feed.followers for feed in self._feeds.values())

    def close(self) -> None:
        """Take no more publications, and wake every follower, which then ends."""
        self._subscription.cancel()
        for feed in self._feeds.values():
            feed.wake()

    def _published(self, publication: Publication) -> None:
        """On the bus's thread: hand on what somebody follows, in one go."""
        message = publication.message
        if not isinstance(message, EventPublished) or message.event.run_id not in self._feeds:
            return
        event = message.event
        self._pending.append((event.run_id, FeedEvent.of(event, event.model_dump_json().encode())))
        if not self._scheduled:
            self._scheduled = True
            try:
                self._loop.call_soon_threadsafe(self._take)
            except RuntimeError:
                return  # the gateway has stopped

    def _take(self) -> None:
        self._scheduled = False
        while self._pending:
            run_id, event = self._pending.popleft()
            feed = self._feeds.get(run_id)
            if feed is not None:
                feed.add(event)

    async def follow(self, run_id: str, after: int) -> AsyncGenerator[list[FeedEvent], None]:
        """Events of a run behind `after`, in order and without a gap, some at a time, until its
        last; an empty list now and then while nothing comes. Raises Problem for an unknown run."""
        feed = self._feeds.setdefault(run_id, _Feed())
        feed.followers += 1
        try:
            while True:
                changed = feed.changed
                events = feed.after(after)
                ended = False
                if not events:
                    events, ended = await self._read(run_id, after)
                if events:
                    after = events[-1].seq
                yield events
                if any(event.event_type in TERMINAL_EVENTS for event in events):
                    return
                if not events:
                    if ended:
                        return
                    await _wait(changed, _LOOK_SECONDS)
        finally:
            feed.followers -= 1
            if not feed.followers:
                del self._feeds[run_id]

    async def _read(self, run_id: str, after: int) -> tuple[list[FeedEvent], bool]:
        """A page from the journal, and whether the run has no more events than that."""
        read = ReadRawEvents(run_id=run_id, after=after, limit=_PAGE)
        try:
            page, (text, *_) = await self._bus.read(JOURNAL, read, RawEvents)
        except Problem as problem:
            if problem.code is Code.NOT_FOUND:
                raise
            return [], False  # the journal is being restarted: look again
        lines = text.split(b"\n")
        events = [FeedEvent.of(RunEvent.model_validate_json(line), line) for line in lines if line]
        return events, page.ended and page.last >= page.last_seq

    async def wait_end(self, run_id: str, seconds: float) -> bool:
        """Wait until a run has ended; False where it has not within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                after = await self._newest(run_id)
                async with contextlib.aclosing(self.follow(run_id, after)) as feed:
                    async for _ in feed:
                        pass
        except TimeoutError:
            return False
        return True

    async def _newest(self, run_id: str) -> int:
        read = ReadRawEvents(run_id=run_id, limit=1)
        page = await self._bus.get(JOURNAL, read, RawEvents)
        # One back, so that the last of a run that has ended meanwhile is still to come.
        return page.last_seq - 1


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
