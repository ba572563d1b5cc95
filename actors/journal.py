"""The journal actor: the one writer of runs and events, and the publisher of what it wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from voidbus.actors.held_runs import HeldRun, HeldRuns
from voidbus.actors.journal_store import (
    JournalConflict,
    JournalError,
    JournalStore,
    NoSuchRun,
)
from voidbus.actors.messages.artifacts import ArtifactList, FindArtifact, ListArtifacts
from voidbus.actors.messages.journal import (
    ActiveRuns,
    Appended,
    AppendEvents,
    CreateRun,
    FindUnlisted,
    ForgetIntents,
    LoadActive,
    PruneRuns,
    ReadStages,
    RecordProcess,
    RunEnded,
    RunsPruned,
    StageEvents,
    TakeIntents,
    Unlisted,
)
from voidbus.actors.messages.runs import (
    CountRunStates,
    EventPage,
    EventPublished,
    InspectRun,
    ListRuns,
    RawEvents,
    ReadEvents,
    ReadRawEvents,
    ReadRuns,
    RunEvent,
    RunList,
    RunRead,
    RunsRead,
    RunState,
    RunStateCounts,
    events_topic,
    run_node,
)
from voidbus.actors.messages.sessions import AddToSession, ReadSession, SessionRead
from voidbus.actors.messages.sidecar import IntentList
from voidbus.actors.runtime.actor import LATER, Actor, Place, Refuse, handles
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason

# A list shows this much of each run's output (characters); `InspectRun` gives all of it.
_LISTED_OUTPUT = 1000
# A page of events is one message of 4 MiB at most (bytes).
_PAGE_BYTES = 2_000_000
# Events that come with each run that is read.
_EVENTS_READ = 1000
# Ended runs that are held in memory, and what one of them may have to be (bytes).
_HELD_BYTES = 8 * 1024 * 1024
_HELD_RUN_BYTES = 64 * 1024
# Files of one run that are listed: 64 of a stage, and its output, are kept.
_ARTIFACTS_LISTED = 10_000
# Runs forgotten in one transaction: others wait for it meanwhile. One may have 32 MiB of events.
_PRUNED_AT_ONCE = 8
_COUNTED_AT_ONCE = 1000
# Messages of a session; the oldest are forgotten.
_SESSION_LIMIT = 1000


class Journal(Actor):
    """Journals before anything happens, publishes after it is on disk.

    Its handlers do wait for the disk: that is its whole work, and nobody else's thread does it.
    """

    mailbox_limit = 20_000

    def __init__(self, place: Place, path: Path, runs: str) -> None:
        super().__init__(place)
        self._path = path
        self._runs = runs
        self._store: JournalStore | None = None
        self._held = HeldRuns(_HELD_BYTES)

    def on_start(self) -> None:
        self._store = JournalStore(self._path)

    def on_stop(self) -> None:
        if self._store is not None:
            self._store.close()

    @property
    def store(self) -> JournalStore:
        assert self._store is not None
        return self._store

    @handles(CreateRun)
    def on_create(self, message: CreateRun, delivery: Delivery) -> Appended:
        with _as_faults():
            self.store.create(message, time.time_ns() // 1_000_000)
        self._publish(message.state.id, message.events)
        return Appended(run_id=message.state.id, last_seq=len(message.events) - 1, ended=False)

    @handles(RecordProcess)
    def on_record_process(self, message: RecordProcess, delivery: Delivery) -> None:
        with _as_faults():
            self.store.record_process(message.run_id, message.process)

    @handles(AppendEvents)
    def on_append(self, message: AppendEvents, delivery: Delivery) -> Appended:
        self._check_sender(message.run_id, delivery)
        with _as_faults():
            ends_it = message.outcome is not None and not self._has_ended(message.run_id)
            state, fresh = self.store.append(message)
        if ends_it:
            # First: who sees the run's last event may start another run in its place.
            self.tell(self._runs, RunEnded(run_id=message.run_id, status=state.status))
        self._publish(message.run_id, fresh)
        if ends_it:
            self.system.node.retire_topic(events_topic(message.run_id))
        return Appended(run_id=message.run_id, last_seq=state.last_seq, ended=state.status.terminal)

    @handles(FindArtifact)
    def on_find_artifact(self, message: FindArtifact, delivery: Delivery) -> ArtifactList:
        with _as_faults():
            found = self.store.artifact(message.run_id, message.stage, message.name)
            if found is None:
                self.store.run(message.run_id)
        return ArtifactList(run_id=message.run_id, artifacts=(found,) if found else ())

    @handles(ListArtifacts)
    def on_list_artifacts(self, message: ListArtifacts, delivery: Delivery) -> ArtifactList:
        with _as_faults():
            self.store.run(message.run_id)
            artifacts = self.store.artifacts(message.run_id, _ARTIFACTS_LISTED)
        return ArtifactList(run_id=message.run_id, artifacts=artifacts)

    @handles(PruneRuns)
    def on_prune(self, message: PruneRuns, delivery: Delivery) -> RunsPruned:
        prune = self.store.prunable if message.dry_run else self.store.prune
        limit = _COUNTED_AT_ONCE if message.dry_run else _PRUNED_AT_ONCE
        self._held.clear()
        with _as_faults():
            pruned = prune(message.before_ms, message.max_bytes, limit)
        return RunsPruned(runs=pruned.runs, size_bytes=pruned.size, more=pruned.more)

    @handles(FindUnlisted)
    def on_find_unlisted(self, message: FindUnlisted, delivery: Delivery) -> Unlisted:
        with _as_faults():
            return Unlisted(digests=self.store.unlisted(message.digests))

    @handles(AddToSession)
    def on_add_to_session(self, message: AddToSession, delivery: Delivery) -> None:
        with _as_faults():
            body = message.message.model_dump_json()
            self.store.add_to_session(message.session_id, body, _SESSION_LIMIT)

    @handles(ReadSession)
    def on_read_session(self, message: ReadSession, delivery: Delivery) -> object:
        with _as_faults():
            bodies = self.store.session(message.session_id)
        delivery.reply(SessionRead(count=len(bodies)), ["\n".join(bodies).encode()])
        return LATER

    @handles(LoadActive)
    def on_load_active(self, message: LoadActive, delivery: Delivery) -> ActiveRuns:
        with _as_faults():
            return ActiveRuns(
                runs=self.store.active(), last_generation=self.store.last_generation()
            )

    @handles(ReadStages)
    def on_read_stages(self, message: ReadStages, delivery: Delivery) -> StageEvents:
        with _as_faults():
            events = self.store.stage_events(message.run_id)
        return StageEvents(run_id=message.run_id, events=events)

    @handles(TakeIntents)
    def on_take_intents(self, message: TakeIntents, delivery: Delivery) -> IntentList:
        with _as_faults():
            intents = self.store.take_intents(message.run_id, drain=message.drain)
        return IntentList(run_id=message.run_id, intents=intents[message.offset :])

    @handles(ForgetIntents)
    def on_forget_intents(self, message: ForgetIntents, delivery: Delivery) -> None:
        with _as_faults():
            self.store.forget_intents(message.run_id, message.intent_ids)

    @handles(ListRuns)
    def on_list(self, message: ListRuns, delivery: Delivery) -> RunList:
        active = None if message.state is None else message.state == "active"
        with _as_faults():
            runs, total = self.store.runs(active=active, limit=message.limit, offset=message.offset)
        return RunList(runs=tuple(_without_long_output(run) for run in runs), total=total)

    @handles(InspectRun)
    def on_inspect_run(self, message: InspectRun, delivery: Delivery) -> RunState:
        with _as_faults():
            return self.store.run(message.run_id)

    @handles(ReadEvents)
    def on_read_events(self, message: ReadEvents, delivery: Delivery) -> EventPage:
        with _as_faults():
            state = self.store.run(message.run_id)
            events = self.store.events(
                message.run_id, after=message.after, limit=message.limit, stream=message.stream
            )
        # A page is one message: what would not fit in its body comes with the next one.
        size, kept = 0, 0
        for event in events:
            size += len(event.message) + len(str(event.payload)) + 800
            if size > _PAGE_BYTES and kept:
                break
            kept += 1
        return EventPage(
            run_id=message.run_id,
            events=events[:kept],
            last_seq=state.last_seq,
            ended=state.status.terminal,
        )

    @handles(ReadRawEvents)
    def on_read_raw_events(self, message: ReadRawEvents, delivery: Delivery) -> object:
        with _as_faults():
            state = self.store.run(message.run_id)
            after = message.after
            if message.after_id is not None:
                known = self.store.seq_of(message.run_id, message.after_id)
                after = after if known is None else known
            bodies, last = self.store.raw_events(
                message.run_id,
                after=after,
                limit=message.limit,
                stream=message.stream,
                max_bytes=_PAGE_BYTES,
            )
        page = RawEvents(
            run_id=message.run_id, last=last, last_seq=state.last_seq, ended=state.status.terminal
        )
        delivery.reply(page, ["\n".join(bodies).encode()])
        return LATER

    @handles(ReadRuns)
    def on_read_runs(self, message: ReadRuns, delivery: Delivery) -> object:
        read: list[RunRead] = []
        attachments: list[bytes] = []
        left = _PAGE_BYTES
        for run_id in message.run_ids:
            held = self._held.get(run_id)
            with _as_faults():
                found = (held, held.last_seq) if held else self._read_run(run_id, max(left, 0))
            if found is None:
                read.append(RunRead(run_id=run_id, found=False))
                continue
            run, last = found
            left -= run.size
            if left < 0 and read:
                break  # it comes with the asker's next question
            attachments += (run.state, run.events)
            read.append(RunRead(run_id=run_id, found=True, last=last, last_seq=run.last_seq))
        delivery.reply(RunsRead(runs=tuple(read)), attachments)
        return LATER

    def _read_run(self, run_id: str, max_bytes: int) -> tuple[HeldRun, int] | None:
        """A run with its first events, and the seq of the last of those."""
        kept = self.store.kept(run_id)
        if kept is None:
            return None
        state, last_seq, ended = kept
        bodies, last = self.store.raw_events(
            run_id, after=-1, limit=_EVENTS_READ, stream=None, max_bytes=max_bytes
        )
        run = HeldRun(state.encode(), "\n".join(bodies).encode(), last_seq)
        if ended and last == last_seq and run.size <= _HELD_RUN_BYTES:
            self._held.hold(run_id, run)
        return run, last

    @handles(CountRunStates)
    def on_count_states(self, message: CountRunStates, delivery: Delivery) -> RunStateCounts:
        with _as_faults():
            machines, stages = self.store.active_counts()
            return RunStateCounts(counts=self.store.counts(), machines=machines, stages=stages)

    def _has_ended(self, run_id: str) -> bool:
        return self.store.run(run_id).status.terminal

    def _publish(self, run_id: str, events: tuple[RunEvent, ...]) -> None:
        topic = events_topic(run_id)
        for event in events:
            self.publish(topic, EventPublished(event=event))

    def _check_sender(self, run_id: str, delivery: Delivery) -> None:
        """A run's process may write its own run only."""
        node = delivery.sender.partition("/")[0]
        if delivery.right is not None and node != run_node(run_id):
            raise Refuse(f"{node} may not write events of run {run_id}")


def _without_long_output(run: RunState) -> RunState:
    """A run for a list: a thousand reports of half a megabyte would be no message."""
    if run.report is None or len(run.report.output) <= _LISTED_OUTPUT:
        return run
    report = run.report.model_copy(update={"output": run.report.output[:_LISTED_OUTPUT]})
    return run.model_copy(update={"report": report})


@contextmanager
def _as_faults() -> Iterator[None]:
    """What the journal can't do is its asker's answer, not its own end."""
    try:
        yield
    except NoSuchRun as error:
        raise Refuse(str(error), FaultReason.NO_SUCH_ACTOR) from error
    except JournalConflict as error:
        raise Refuse(str(error), FaultReason.STALE) from error
    except JournalError as error:
        raise Refuse(str(error), FaultReason.FAILED) from error
