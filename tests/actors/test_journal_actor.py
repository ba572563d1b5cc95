"""The journal actor: its answers, its faults, what it publishes, and who may write."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from actor_kit import PATIENCE, ask, local_system, reply
from journal_kit import a_batch, a_run
from run_kit import Notes

from voidbus.actors.journal import Journal
from voidbus.actors.messages.actor import Done
from voidbus.actors.messages.journal import (
    ActiveRuns,
    Appended,
    LoadActive,
    ProcessRecord,
    RecordProcess,
    RunEnded,
    RunOutcome,
    TakeIntents,
)
from voidbus.actors.messages.runs import (
    EventPage,
    EventPublished,
    InspectRun,
    ListRuns,
    ReadEvents,
    RunList,
    RunReport,
    RunState,
    RunStatus,
    events_topic,
)
from voidbus.actors.messages.sidecar import IntentList
from voidbus.actors.runtime.system import System
from voidbus.sidecar.model import Intent
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message, Right
from voidbus.transport.topics import Publication

INTENT = Intent.model_validate(
    {
        "intent_id": "int-1",
        "from_candidate_id": "r1",
        "iteration": 0,
        "kind": "signal",
        "audience": "broadcast",
        "payload": {"summary_text": "hi"},
        "priority": "normal",
    }
)
SUCCEEDED = RunOutcome(status=RunStatus.SUCCEEDED, intents=(INTENT,))


@pytest.fixture
def told() -> Notes:
    return Notes()


@pytest.fixture
def system(tmp_path: Path, told: Notes) -> Iterator[System]:
    with local_system() as made:
        made.node.attach("runs", told)
        made.start(Journal, "journal", tmp_path / "journal.sqlite", "here/runs")
        yield made


def put(system: System, message: Message) -> Message:
    return ask(system, "journal", message).wait()


def refused(system: System, message: Message) -> Fault:
    return reply(ask(system, "journal", message), Fault)


def test_a_run_is_created_and_looked_at(system: System) -> None:
    assert put(system, a_run()) == Appended(run_id="r1", last_seq=1, ended=False)
    state = reply(ask(system, "journal", InspectRun(run_id="r1")), RunState)
    assert (state.id, state.status, state.last_seq) == ("r1", RunStatus.RUNNING, 1)
    listed = reply(ask(system, "journal", ListRuns()), RunList)
    assert (listed.runs, listed.total) == ((state,), 1)


@pytest.mark.parametrize(
    "message",
    [
        InspectRun(run_id="nope"),
        ReadEvents(run_id="nope"),
        TakeIntents(run_id="nope", drain=True),
        a_batch("nope", first=0),
        RecordProcess(run_id="nope", process=ProcessRecord(generation=1, token_digest="")),
    ],
)
def test_a_run_it_does_not_know_is_a_fault_that_names_it(system: System, message: Message) -> None:
    fault = refused(system, message)
    assert fault.reason is FaultReason.NO_SUCH_ACTOR
    assert "nope" in fault.detail
    assert put(system, a_run()).tag == "journal.appended", "the journal lives on"


def test_what_does_not_fit_is_stale(system: System) -> None:
    put(system, a_run())
    assert refused(system, a_run()).reason is FaultReason.STALE
    assert refused(system, a_batch(first=9)).reason is FaultReason.STALE
    assert refused(system, a_batch(first=2, generation=5)).reason is FaultReason.STALE
    put(system, a_batch(first=2, outcome=SUCCEEDED))
    assert refused(system, a_batch(first=4)).reason is FaultReason.STALE


def test_pages_hold_what_was_asked_for(system: System) -> None:
    put(system, a_run(events=2))
    put(system, a_batch(first=2, count=5))
    first = reply(ask(system, "journal", ReadEvents(run_id="r1", after=1, limit=3)), EventPage)
    assert [e.seq for e in first.events] == [2, 3, 4]
    assert (first.last_seq, first.ended) == (6, False)
    streamed = reply(ask(system, "journal", ReadEvents(run_id="r1", stream="stdout")), EventPage)
    assert [e.seq for e in streamed.events] == [2, 3, 4, 5, 6]


def test_a_page_fits_in_a_message_however_long_its_events_are(system: System) -> None:
    put(system, a_run(events=0))
    for first in range(0, 40, 10):
        batch = a_batch(first=first, count=10)
        long = tuple(e.model_copy(update={"message": "x" * 100_000}) for e in batch.events)
        put(system, batch.model_copy(update={"events": long}))
    seen: list[int] = []
    pages = 0
    while True:
        after = seen[-1] if seen else -1
        page = reply(
            ask(system, "journal", ReadEvents(run_id="r1", after=after, limit=1000)), EventPage
        )
        if not page.events:
            break
        assert len(page.to_json()) < 4 * 1024 * 1024
        seen += [e.seq for e in page.events]
        pages += 1
    assert seen == list(range(40))
    assert pages > 1


def test_events_are_published_after_they_are_on_disk(system: System, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    on_disk: list[bool] = []
    enough = threading.Event()

    def take(publication: Publication) -> None:
        assert isinstance(publication.message, EventPublished)
        seq = publication.message.event.seq
        seen.append((publication.number, seq))
        with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as other:
            on_disk.append(
                other.execute("SELECT count(*) FROM events WHERE seq = ?", (seq,)).fetchone()[0]
                == 1
            )
        if len(seen) == 5:
            enough.set()

    subscription = system.node.subscribe(events_topic("r1"), take)
    assert subscription.wait_ready(PATIENCE)
    put(system, a_run(events=2))
    batch = a_batch(first=2, count=3)
    put(system, batch)
    put(system, batch)  # again: nothing is published twice
    assert enough.wait(PATIENCE)
    put(system, InspectRun(run_id="r1"))
    assert seen == [(n + 1, n) for n in range(5)]
    assert on_disk == [True] * 5
    assert subscription.lost == 0


def test_what_was_refused_is_not_published(system: System) -> None:
    seen: list[Publication] = []
    subscription = system.node.subscribe(events_topic("r1"), seen.append)
    assert subscription.wait_ready(PATIENCE)
    put(system, a_run(events=0))
    refused(system, a_batch(first=5))
    put(system, InspectRun(run_id="r1"))
    assert seen == []


def test_the_runs_actor_is_told_of_an_outcome_once(system: System, told: Notes) -> None:
    put(system, a_run())
    batch = a_batch(first=2, outcome=SUCCEEDED)
    assert put(system, batch) == Appended(run_id="r1", last_seq=3, ended=True)
    assert put(system, batch) == Appended(run_id="r1", last_seq=3, ended=True)
    assert told.messages == [RunEnded(run_id="r1", status=RunStatus.SUCCEEDED)]


def test_intents_left_by_a_run_are_there_until_they_are_drained(system: System) -> None:
    put(system, a_run())
    put(system, a_batch(first=2, outcome=SUCCEEDED))
    for drain, expected in ((False, (INTENT,)), (True, (INTENT,)), (False, ())):
        got = reply(ask(system, "journal", TakeIntents(run_id="r1", drain=drain)), IntentList)
        assert got.intents == expected


def test_active_runs_come_with_their_processes(system: System) -> None:
    put(system, a_run("r1", generation=1))
    put(system, a_run("r2", generation=2))
    process = ProcessRecord(generation=4, token_digest="ab", pid=12, start_time=34)
    assert isinstance(put(system, RecordProcess(run_id="r2", process=process)), Done)
    put(system, a_batch("r1", first=2, outcome=SUCCEEDED))
    active = reply(ask(system, "journal", LoadActive()), ActiveRuns)
    assert [(state.id, record) for state, record in active.runs] == [("r2", process)]
    assert active.last_generation == 4
    listed = reply(ask(system, "journal", ListRuns(state="terminal")), RunList)
    assert [run.id for run in listed.runs] == ["r1"]


@pytest.mark.parametrize(
    ("sender", "right", "accepted"),
    [
        ("run-r1/run", Right.WORK, True),
        ("run-r2/run", Right.WORK, False),
        ("client-1/", Right.OPERATE, False),
        ("runs", None, True),
    ],
)
def test_only_a_runs_own_process_and_the_supervisor_may_write_its_events(
    system: System, sender: str, right: Right | None, accepted: bool
) -> None:
    put(system, a_run())
    answers: list[Message] = []
    answered = threading.Event()

    def answer(message: Message, attachments: object) -> None:
        answers.append(message)
        answered.set()

    journal = system.find("journal")
    assert journal is not None
    batch = a_batch(first=2)
    asked = Delivery("journal", sender, batch, 1e12, answer)
    asked.right = right
    journal.deliver(asked)
    assert answered.wait(PATIENCE)
    if accepted:
        assert isinstance(answers[0], Appended)
    else:
        assert isinstance(answers[0], Fault)
        assert answers[0].reason is FaultReason.REFUSED


def test_a_damaged_journal_is_an_answer_and_not_the_actors_end(
    system: System, tmp_path: Path
) -> None:
    put(system, a_run())
    for path in tmp_path.glob("journal.sqlite*"):
        path.write_bytes(b"this is no database" * 1000)
    journal = system.find("journal")
    assert isinstance(journal, Journal)
    journal.post(journal.store._db.close)
    fault = refused(system, InspectRun(run_id="r1"))
    assert fault.reason is FaultReason.FAILED
    assert "journal.sqlite" in fault.detail
    assert system.find("journal") is journal


def test_a_list_of_runs_with_long_outputs_is_still_one_message(system: System) -> None:
    report = RunReport(name="n", kind="agent", success=True, output="x" * 500_000, stages=1)
    for number in range(12):
        put(system, a_run(f"r{number}"))
        outcome = RunOutcome(status=RunStatus.SUCCEEDED, report=report)
        put(system, a_batch(f"r{number}", first=2, outcome=outcome))
    listed = put(system, ListRuns())
    assert isinstance(listed, RunList)
    assert listed.total == 12
    assert len(listed.to_json()) < 100_000
    whole = put(system, InspectRun(run_id="r3"))
    assert isinstance(whole, RunState)
    assert whole.report == report
