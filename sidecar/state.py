"""What one run's sidecar knows: an inbox, intents, and the rules between them.

Pure: no I/O, no thread, no clock. The HTTP server and the sidecar actor both call it, so
whoever shares it guards it with a lock; every operation is short.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from voidbus.sidecar.inbox import MAX_INBOX_BYTES, MAX_INBOX_ENTRIES, Inbox
from voidbus.sidecar.intents import (
    MAX_BUFFERED_INTENTS,
    MAX_PAYLOAD_BYTES,
    IntentBuffer,
    random_intent_id,
)
from voidbus.sidecar.model import (
    InboxEntry,
    InboxSnapshot,
    InboxView,
    Intent,
    Rejected,
    Rejection,
    SidecarContext,
    SidecarCounters,
    SidecarSnapshot,
    SidecarStatus,
    too_large,
)
from voidbus.sidecar.submission import read_submissions


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a run may hold in memory."""

    inbox_entries: int = MAX_INBOX_ENTRIES
    inbox_bytes: int = MAX_INBOX_BYTES
    buffered_intents: int = MAX_BUFFERED_INTENTS


@dataclass(frozen=True, slots=True)
class Loaded:
    """What loading an inbox did."""

    version: int
    iteration: int
    entries: int
    expired: tuple[Intent, ...]


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of one request's intents, in order, up to the first rejection."""

    intents: tuple[Intent, ...]
    duplicates: tuple[bool, ...]
    """For each intent, whether it had been accepted before."""
    is_batch: bool
    rejection: Rejection | None


class SidecarState:
    """One run's inbox and intents.

    `execution_id` and `candidate_id` are what the guest is told it is, and `candidate_id`
    what its intents are stamped with; loading an inbox changes neither.
    """

    def __init__(
        self,
        *,
        execution_id: str,
        candidate_id: str,
        peers: Iterable[str] = (),
        limits: Limits | None = None,
        new_intent_id: Callable[[], str] = random_intent_id,
    ) -> None:
        bounds = limits or Limits()
        self._execution_id = execution_id
        self._candidate_id = candidate_id
        self._peers = tuple(peers)
        self._inbox = Inbox(
            execution_id,
            candidate_id,
            max_entries=bounds.inbox_entries,
            max_bytes=bounds.inbox_bytes,
        )
        self._intents = IntentBuffer(
            candidate_id, max_buffered=bounds.buffered_intents, new_intent_id=new_intent_id
        )
        self._counters = SidecarCounters()

    def context(self) -> SidecarContext:
        """Who the agent is, and the iteration of its inbox."""
        return SidecarContext(
            execution_id=self._execution_id,
            candidate_id=self._candidate_id,
            iteration=self._inbox.iteration,
            peers=self._peers,
        )

    def status(self) -> SidecarStatus:
        """How many intents wait, and the inbox's version."""
        return SidecarStatus(buffer_depth=len(self._intents), inbox_version=self._inbox.version)

    def counters(self) -> SidecarCounters:
        """Totals since the state was made."""
        return self._counters

    def inbox(self, since: int | None = None) -> InboxView:
        """The inbox: whole, or what arrived after version `since`."""
        return self._inbox.view(since)

    def news(self, since: int | None) -> InboxView | None:
        """What a follower at version `since` has missed; None where that is nothing."""
        return self._inbox.news(since)

    def load_inbox(self, snapshot: InboxSnapshot) -> Loaded:
        """Replace the inbox and begin its iteration: a new share of intents, old ones expire.

        Raises Rejected (413) when the inbox is over a limit; nothing is changed then.
        """
        self._inbox.load(snapshot)
        expired = tuple(self._intents.begin_iteration(snapshot.iteration))
        self._count(expired=len(expired))
        return Loaded(self._inbox.version, snapshot.iteration, len(self._inbox), expired)

    def push_message(self, entry: InboxEntry) -> int:
        """Add a message to the inbox, which is made if none was loaded; its new version.

        Raises Rejected (413) when the inbox is full; nothing is changed then.
        """
        self._inbox.push(entry)
        return self._inbox.version

    def submit(self, body: bytes, *, idempotency_key: str | None = None) -> Submitted:
        """Take the body of `POST /v1/intents`: an object, or an array of them.

        The key belongs to the first item only. The first rejection ends the request; what
        was accepted before it stays.
        """
        try:
            submissions = read_submissions(body)
            if not submissions.is_batch and len(body) > MAX_PAYLOAD_BYTES:
                raise Rejected(
                    too_large(f"intent is {len(body)} bytes; the limit is {MAX_PAYLOAD_BYTES}")
                )
        except Rejected as refused:
            self._count(rejected=1)
            return Submitted((), (), is_batch=False, rejection=refused.rejection)

        intents: list[Intent] = []
        duplicates: list[bool] = []
        rejection = None
        for index, submission in enumerate(submissions.items):
            key = idempotency_key if index == 0 else None
            try:
                intent, duplicate = self._intents.submit(
                    submission, iteration=self._inbox.iteration, key=key
                )
            except Rejected as refused:
                rejection = refused.rejection
                break
            intents.append(intent)
            duplicates.append(duplicate)
        self._count(
            accepted=duplicates.count(False),
            deduplicated=duplicates.count(True),
            rejected=0 if rejection is None else 1,
        )
        return Submitted(tuple(intents), tuple(duplicates), submissions.is_batch, rejection)

    def peek(self, limit: int | None = None) -> list[Intent]:
        """The oldest waiting intents, kept until they are acknowledged or expire."""
        return self._intents.peek(limit)

    def acknowledge(self, intent_ids: Iterable[str]) -> int:
        """Forget intents that have been handed over; how many of the ids were waiting.

        Their hashes and keys go with them: sent again, they are new.
        """
        removed = len(self._intents.remove(intent_ids))
        self._count(acknowledged=removed)
        return removed

    def drain(self, limit: int | None = None) -> list[Intent]:
        """Hand over and forget the oldest waiting intents, in one step."""
        intents = self.peek(limit)
        self.acknowledge(intent.intent_id for intent in intents)
        return intents

    def snapshot(self) -> SidecarSnapshot:
        """Everything held, to be handed on."""
        return SidecarSnapshot(
            inbox=self._inbox.view(),
            arrivals=self._inbox.arrivals(),
            given_version=self._inbox.given_version,
            intents=tuple(self._intents.peek()),
            accepted_in_iteration=self._intents.accepted_in_iteration,
            content_hashes=dict(self._intents.content_hashes),
            idempotency_keys=dict(self._intents.idempotency_keys),
            counters=self._counters,
        )

    def restore(self, snapshot: SidecarSnapshot) -> None:
        """Take over what another state held; what this one held is forgotten."""
        self._inbox.restore(snapshot.inbox, snapshot.arrivals, snapshot.given_version)
        self._intents.restore(snapshot.intents)
        self._intents.accepted_in_iteration = snapshot.accepted_in_iteration
        self._intents.content_hashes = dict(snapshot.content_hashes)
        self._intents.idempotency_keys = dict(snapshot.idempotency_keys)
        self._counters = snapshot.counters

    def _count(self, **more: int) -> None:
        totals = self._counters.model_dump()
        self._counters = SidecarCounters(
            **{name: total + more.get(name, 0) for name, total in totals.items()}
        )
