"""The journal actor: the one writer of runs and events, and the publisher of what it wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from voidbus.actors.journal_store import (
    JournalConflict,
    JournalError,
    JournalStore,
    NoSuchRun,
)
from voidbus.actors.messages.journal import (
    ActiveRuns,
    Appended,
    AppendEvents,
    CreateRun,
    LoadActive,
    ReadStages,
    RecordProcess,
    RunEnded,
    StageEvents,
    TakeIntents,
)
from voidbus.actors.messages.runs import (
    EventPage,
    EventPublished,
    InspectRun,
    ListRuns,
    ReadEvents,
    RunEvent,
    RunList,
    RunState,
    events_topic,
    run_node,
)
from voidbus.actors.messages.sidecar import IntentList
from voidbus.actors.runtime.actor import Actor, Place, Refuse, handles
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason

# A list shows this much of each run's output (characters); `InspectRun` gives all of it.
_LISTED_OUTPUT = 1000


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
        self._publish(message.run_id, fresh)
        if ends_it:
            self.tell(self._runs, RunEnded(run_id=message.run_id, status=state.status))
            self.system.node.retire_topic(events_topic(message.run_id))
        return Appended(run_id=message.run_id, last_seq=state.last_seq, ended=state.status.terminal)

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
        return IntentList(run_id=message.run_id, intents=intents)

    @handles(ListRuns)
    def on_list(self, message: ListRuns, delivery: Delivery) -> RunList:
        active = None if message.state is None else message.state == "active"
        with _as_faults():
            runs, total = self.store.runs(active=active, limit=message.limit)
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
            if size > 2_000_000 and kept:
                break
            kept += 1
        return EventPage(
            run_id=message.run_id,
            events=events[:kept],
            last_seq=state.last_seq,
            ended=state.status.terminal,
        )

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
