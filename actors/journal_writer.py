"""How a run process gets its events into the journal: spooled first, sent in order, until acked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from voidbus.actors.messages.artifacts import StoredArtifact
from voidbus.actors.messages.journal import Appended, AppendEvents, RunOutcome, RunProgress
from voidbus.actors.messages.runs import RunEvent
from voidbus.actors.runtime.actor import Actor
from voidbus.actors.spool import Spool
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

log = logging.getLogger("voidbus.actors")

# Batches are at least this far apart (seconds): an event after a quiet time is sent at once, and a
# chatty program costs fifty transactions a second and not five thousand.
_GATHER_SECONDS = 0.02
_BATCH_LIMIT = 500
# A batch is one message, 4 MiB at most; an outcome's report may take 3 MiB of it.
_BATCH_BYTES = 512 * 1024
_RETRY_SECONDS = 0.5
_ASK_TIMEOUT = 10.0


class JournalWriter:
    """Used by one actor, in its thread. `journal` is the journal's address.

    One batch is under way at a time. A batch that can't be delivered is sent again until it is:
    the journal skips what it has.
    """

    def __init__(
        self,
        actor: Actor,
        spool_path: Path,
        *,
        run_id: str,
        generation: int,
        journal: str,
        on_rejected: Callable[[str], None],
    ) -> None:
        self._actor = actor
        self._spool = Spool(spool_path)
        self._run_id = run_id
        self._generation = generation
        self._journal = journal
        self._on_rejected = on_rejected
        # Batches that each fit in a message; the last one is being gathered.
        self._batches: list[list[RunEvent]] = [[]]
        self._bytes = 0
        self._outcome: RunOutcome | None = None
        self._retrying = False
        self._progress: RunProgress | None = None
        self._artifacts: list[StoredArtifact] = []
        self._gathering = False
        self._committed_at = 0.0
        self._sending = False
        self._closed = False
        self._on_flushed: Callable[[], None] | None = None

    def add(self, event: RunEvent) -> None:
        size = len(event.model_dump_json())
        full = self._bytes + size > _BATCH_BYTES or len(self._batches[-1]) >= _BATCH_LIMIT
        if full and self._batches[-1]:
            self._batches.append([])
            self._bytes = 0
        self._batches[-1].append(event)
        self._bytes += size
        if full and not self._retrying:
            self.commit()
        else:
            self._commit_soon()

    def _commit_soon(self) -> None:
        if not self._gathering:
            self._gathering = True
            since = self._actor.system.clock() - self._committed_at
            self._actor.after(max(0.0, _GATHER_SECONDS - since), self.commit)

    def progress(self, progress: RunProgress) -> None:
        """Let the next batch carry this."""
        self._progress = progress
        self._commit_soon()

    def artifact(self, artifact: StoredArtifact) -> None:
        """Let the next batch list this; the event that tells of it follows."""
        self._artifacts.append(artifact)

    def end(self, terminal: RunEvent, outcome: RunOutcome) -> None:
        """Journal the run's last event and its outcome, always in one batch: there is neither
        without the other, whatever becomes of this process."""
        if self._batches[-1]:
            self._batches.append([])
        self._batches[-1].append(terminal)
        self._outcome = outcome
        self.commit()

    def commit(self) -> None:
        """Spool what was gathered, and send."""
        self._gathering = False
        self._committed_at = self._actor.system.clock()
        if self._closed:
            return
        try:
            while len(self._batches) > 1:
                self._spool.add(self._batch(self._batches[0]))
                del self._batches[0]
            self._commit_newest()
        except OSError as error:
            # Nothing is lost yet: what was gathered is kept and tried again.
            log.error("run %s: cannot spool its events: %s", self._run_id, error)
            self._retry()
        self._send()

    def _commit_newest(self) -> None:
        events = self._batches[0]
        if events or self._progress or self._artifacts or self._outcome:
            batch = self._batch(events).model_copy(
                update={
                    "progress": self._progress,
                    "artifacts": tuple(self._artifacts),
                    "outcome": self._outcome,
                }
            )
            self._spool.add(batch)
            self._batches, self._bytes = [[]], 0
            self._progress = self._outcome = None
            self._artifacts.clear()

    def _batch(self, events: list[RunEvent]) -> AppendEvents:
        return AppendEvents(run_id=self._run_id, generation=self._generation, events=tuple(events))

    def _retry(self) -> None:
        self._gathering = True
        if self._retrying:
            return
        self._retrying = True

        def again() -> None:
            self._retrying = False
            self.commit()

        self._actor.after(_RETRY_SECONDS, again)

    def when_flushed(self, then: Callable[[], None]) -> None:
        """Call `then` when the journal has everything."""
        self._on_flushed = then
        self._check_flushed()

    def link_up(self) -> None:
        """There is a link again: no need to wait for the next retry."""
        self._send()

    @property
    def waiting(self) -> int:
        return self._spool.waiting

    def close(self) -> None:
        self._closed = True
        self._spool.close()

    def _send(self) -> None:
        if self._sending or self._closed:
            return
        batch = self._spool.next()
        if batch is None:
            self._check_flushed()
            return
        self._sending = True
        self._actor.ask(self._journal, batch, self._answered, timeout=_ASK_TIMEOUT)

    def _answered(self, outcome: Message) -> None:
        self._sending = False
        if self._closed:
            return
        if isinstance(outcome, Appended):
            self._spool.done()
            self._send()
        elif isinstance(outcome, Fault) and outcome.reason in (
            FaultReason.STALE,
            FaultReason.REFUSED,
        ):
            # The journal will never take it: the run was ended without us, or replaced.
            self._on_rejected(outcome.detail)
        else:
            self._actor.after(_RETRY_SECONDS, self._send)

    def _check_flushed(self) -> None:
        gathered = self._batches[0] or self._outcome
        if self._on_flushed is not None and not self._spool.waiting and not gathered:
            then, self._on_flushed = self._on_flushed, None
            then()
