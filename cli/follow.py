"""Following a run's events: in order, without gaps, across a restart of the supervisor."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from queue import Empty, SimpleQueue

from voidbus.actors.messages.runs import (
    EventPage,
    EventPublished,
    ReadEvents,
    RunEvent,
    events_topic,
)
from voidbus.cli.connect import ASK_TIMEOUT, JOURNAL, Refusal, Supervisor
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.output import warn
from voidbus.cli.state import Remote
from voidbus.transport.fault import FaultReason
from voidbus.transport.topics import Gap, Publication

# A follower outlives a restarting supervisor for this long (seconds).
GIVE_UP = 30.0
# Without news for this long, the journal is asked whether there are any: what is lost last on a
# topic is followed by nothing that would show the gap (seconds).
_DOUBT = 5.0
# Publications kept while the journal is read; what is over is read from the journal.
_BACKLOG = 10_000

ENDINGS = frozenset({"run.finished", "run.failed", "run.cancelled"})

_TRANSIENT = frozenset(
    {
        FaultReason.LINK_LOST,
        FaultReason.EXPIRED,
        FaultReason.MAILBOX_FULL,
        FaultReason.MAILBOX_CLOSED,
        FaultReason.OVERLOADED,
        FaultReason.NO_SUCH_NODE,
    }
)


class Wake:
    """What `next` returns when it was woken by `wake` and not by an event."""


class Follower:
    """One run's events after number `after`. Use it with `with`.

    Publications come by the bus's thread; what they can't tell is read from the journal.
    """

    def __init__(self, supervisor: Supervisor, run_id: str, after: int = -1) -> None:
        self.run_id = run_id
        self.last = after
        self._ended = False
        self._supervisor = supervisor
        self._leaf = supervisor.leaf
        # SimpleQueue, because `wake` is called by a signal handler: its put is reentrant.
        self._news: SimpleQueue[RunEvent | None] = SimpleQueue()
        self._pages: deque[RunEvent] = deque()
        self._woken = False
        self._behind = True
        self._links_lost = self._leaf.counters["links_lost"]
        self._down_since: float | None = None
        self._told = False
        self._checked = time.monotonic()
        self._subscription = self._leaf.subscribe(
            events_topic(run_id), self._on_publication, self._on_gap
        )
        # Where the publisher does not confirm, events still come from the journal.
        self._subscription.wait_ready(2.0)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exception: object) -> None:
        self._subscription.cancel()

    @property
    def ended(self) -> bool:
        """Whether the run has ended and its last event has been given."""
        return self._ended and not self._pages

    def wake(self) -> None:
        """Let `next` return. May be called by a signal handler."""
        self._woken = True
        self._news.put(None)

    def next(self, timeout: float) -> RunEvent | type[Wake] | None:
        """The next event; Wake after `wake`; None after `timeout` seconds or when `ended`.

        Raises Failure where the supervisor has been gone for GIVE_UP seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self._woken:
                self._woken = False
                return Wake
            if self._pages:
                return self._give(self._pages.popleft())
            if self._ended:
                return None
            self._notice_link()
            if self._behind and self._leaf.up:
                self._read_page()
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                event = self._news.get(timeout=min(left, 0.25))
            except Empty:
                if time.monotonic() - self._checked >= _DOUBT:
                    self._behind = True
                continue
            if event is None:
                continue
            if event.seq == self.last + 1:
                self._checked = time.monotonic()
                return self._give(event)
            if event.seq > self.last:
                self._behind = True

    def _give(self, event: RunEvent) -> RunEvent:
        self.last = event.seq
        if event.event_type in ENDINGS and not self._pages:
            self._ended = True
        return event

    # -- on the bus's thread ---------------------------------------------------------------

    def _on_publication(self, publication: Publication) -> None:
        message = publication.message
        # The subscription is by prefix: `events/run-1` also brings `events/run-10`.
        if not isinstance(message, EventPublished) or message.event.run_id != self.run_id:
            return
        if self._news.qsize() < _BACKLOG:
            self._news.put(message.event)
        else:
            self._behind = True

    def _on_gap(self, gap: Gap) -> None:
        if gap.topic == events_topic(self.run_id):
            self._behind = True

    # -- the journal -----------------------------------------------------------------------

    def _read_page(self) -> None:
        self._behind = False
        self._checked = time.monotonic()
        try:
            page = self._supervisor.ask(
                JOURNAL, ReadEvents(run_id=self.run_id, after=self.last), EventPage, ASK_TIMEOUT
            )
        except Refusal as refusal:
            if refusal.fault.reason not in _TRANSIENT and not self._restarting(refusal):
                raise
            self._wait_a_little(refusal)
            return
        self._told, self._down_since = False, None
        self._pages.extend(event for event in page.events if event.seq > self.last)
        newest = self._pages[-1].seq if self._pages else self.last
        if newest < page.last_seq and self._pages:
            self._behind = True
        elif page.ended and newest >= page.last_seq:
            self._ended = True

    def _restarting(self, refusal: Refusal) -> bool:
        """A supervisor that is being started has its bus before it has its journal."""
        return (
            refusal.fault.reason is FaultReason.NO_SUCH_ACTOR
            and self._leaf.counters["links_lost"] > 0
        )

    def _wait_a_little(self, refusal: Refusal) -> None:
        """The journal did not answer: try again soon, but not for ever."""
        self._behind = True
        now = time.monotonic()
        if self._down_since is None:
            self._down_since = now
        elif now - self._down_since > GIVE_UP:
            raise refusal
        # What comes meanwhile is in the journal too.
        with contextlib.suppress(Empty):
            self._news.get(timeout=0.1)

    # -- the link --------------------------------------------------------------------------

    def _notice_link(self) -> None:
        """See whether the supervisor is gone, for how long, and whether it has come back."""
        lost = self._leaf.counters["links_lost"]
        if lost != self._links_lost:
            self._links_lost = lost
            self._behind = True
        if self._leaf.up:
            if self._told:
                self._told = False
                self._down_since = None
                self._behind = True
                warn("the supervisor is back")
            return
        now = time.monotonic()
        if self._leaf.refused:
            raise Failure(
                f"the supervisor refused this connection: {self._leaf.refused}",
                ExitCode.NO_SUPERVISOR,
            )
        if self._down_since is None:
            self._down_since = now
        if not self._told:
            self._told = True
            warn(f"lost the supervisor; waiting up to {GIVE_UP:g} s for it to come back")
        if now - self._down_since > GIVE_UP:
            state = self._supervisor.state
            serve = (
                f"on {state}" if isinstance(state, Remote) else f"voidbus serve --state-dir {state}"
            )
            raise Failure(
                f"the supervisor has been gone for {GIVE_UP:g} s; the run {self.run_id} may still "
                f"be alive. Start the supervisor, which adopts it: {serve}; then: voidbus events "
                f"{self.run_id} --follow --since {self.last}",
                ExitCode.NO_SUPERVISOR,
            )
