"""The journal's database keeps its promises: all or nothing, no gaps, no second ending."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_kit import a_batch, a_run

from voidbus.actors.event import EventMaker
from voidbus.actors.journal_store import (
    JournalConflict,
    JournalError,
    JournalStore,
    NoSuchRun,
)
from voidbus.actors.messages.journal import AppendEvents, ProcessRecord, RunOutcome, RunProgress
from voidbus.actors.messages.runs import RunStatus

SUCCEEDED = RunOutcome(status=RunStatus.SUCCEEDED)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JournalStore]:
    journal = JournalStore(tmp_path / "journal.sqlite")
    yield journal
    journal.close()


def seqs(store: JournalStore, run_id: str = "r1") -> list[int]:
    return [event.seq for event in store.events(run_id, after=-1, limit=1000)]


def test_a_created_run_is_there_with_its_events(store: JournalStore) -> None:
    store.create(a_run(events=3), 1)
    assert store.run("r1").last_seq == 2
    assert seqs(store) == [0, 1, 2]


def test_it_is_written_ahead_and_synced_as_that_allows(store: JournalStore, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "journal.sqlite")) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 1  # NORMAL


def test_a_second_run_of_the_same_id_is_refused(store: JournalStore) -> None:
    store.create(a_run(), 1)
    with pytest.raises(JournalConflict, match="r1"):
        store.create(a_run(), 2)


def test_a_batch_sent_twice_is_journaled_once(store: JournalStore) -> None:
    store.create(a_run(), 1)
    batch = a_batch(first=2, count=3)
    assert len(store.append(batch)[1]) == 3
    assert store.append(batch)[1] == ()
    assert seqs(store) == [0, 1, 2, 3, 4]


def test_a_batch_that_overlaps_adds_what_is_new(store: JournalStore) -> None:
    store.create(a_run(), 1)
    store.append(a_batch(first=2, count=2))
    _, fresh = store.append(a_batch(first=3, count=3))
    assert [event.seq for event in fresh] == [4, 5]


def test_a_batch_that_would_leave_a_gap_changes_nothing(store: JournalStore) -> None:
    store.create(a_run(), 1)
    with pytest.raises(JournalConflict, match="gap"):
        store.append(a_batch(first=5, count=2, outcome=SUCCEEDED))
    assert seqs(store) == [0, 1]
    assert store.run("r1").status is RunStatus.RUNNING


def test_a_batch_of_an_old_generation_is_refused(store: JournalStore) -> None:
    store.create(a_run(generation=7), 1)
    with pytest.raises(JournalConflict, match="generation"):
        store.append(a_batch(first=2, generation=6))


def test_an_outcome_is_journaled_with_its_terminal_event(store: JournalStore) -> None:
    store.create(a_run(), 1)
    state, _ = store.append(a_batch(first=2, count=1, outcome=SUCCEEDED))
    last = store.events("r1", after=-1, limit=10)[-1]
    assert state.status is RunStatus.SUCCEEDED
    assert state.terminal_event_id == last.event_id
    assert state.finished_at == last.timestamp
    assert store.active() == ()


def test_an_outcome_that_comes_behind_its_terminal_event_finds_it(store: JournalStore) -> None:
    store.create(a_run(), 1)
    ending = a_batch(first=2, count=1, outcome=SUCCEEDED)
    last = ending.events[-1]
    store.append(ending.model_copy(update={"outcome": None}))
    for late in (a_batch(first=4, count=1), a_batch(first=5, count=0, outcome=None)):
        state, _ = store.append(late)
        assert (state.status, state.terminal_event_id) == (RunStatus.RUNNING, None)
    state, _ = store.append(ending.model_copy(update={"events": ()}))
    assert state.status is RunStatus.SUCCEEDED
    assert (state.terminal_event_id, state.finished_at) == (last.event_id, last.timestamp)


def test_an_outcome_without_any_terminal_event_still_ends_its_run(store: JournalStore) -> None:
    store.create(a_run(), 1)
    state, _ = store.append(AppendEvents(run_id="r1", generation=1, events=(), outcome=SUCCEEDED))
    assert (state.status, state.terminal_event_id) == (RunStatus.SUCCEEDED, None)


def test_a_run_that_has_ended_takes_no_more(store: JournalStore) -> None:
    store.create(a_run(), 1)
    ending = a_batch(first=2, count=1, outcome=SUCCEEDED)
    store.append(ending)
    assert store.append(ending)[0].status is RunStatus.SUCCEEDED
    failed = RunOutcome(status=RunStatus.FAILED, error="too late")
    with pytest.raises(JournalConflict, match="ended"):
        store.append(a_batch(first=4, count=1, outcome=failed))
    assert store.run("r1").status is RunStatus.SUCCEEDED


def test_progress_is_kept_with_the_run(store: JournalStore) -> None:
    store.create(a_run(), 1)
    batch = a_batch(first=2).model_copy(
        update={"progress": RunProgress(machine="process", active_microvm_count=1)}
    )
    store.append(batch)
    assert store.run("r1").machine == "process"
    assert store.run("r1").active_microvm_count == 1


def test_active_runs_come_with_their_processes(store: JournalStore) -> None:
    store.create(a_run("a", generation=3), 1)
    store.create(a_run("b", generation=4), 2)
    store.record_process(
        "b", ProcessRecord(generation=4, token_digest="11" * 32, pid=99, start_time=5)
    )
    active = store.active()
    assert [(state.id, process.pid) for state, process in active] == [("a", 0), ("b", 99)]
    assert store.run("b").run_process == 99
    assert store.last_generation() == 4


def test_runs_are_listed_newest_first_and_counted(store: JournalStore) -> None:
    for number in range(5):
        store.create(a_run(f"r{number}"), number)
    store.append(a_batch("r0", first=2, outcome=SUCCEEDED))
    runs, total = store.runs(active=None, limit=2)
    assert ([run.id for run in runs], total) == (["r4", "r3"], 5)
    assert store.runs(active=True, limit=10)[1] == 4
    assert [run.id for run in store.runs(active=False, limit=10)[0]] == ["r0"]


def test_machines_and_stages_of_any_number_of_runs_are_counted(store: JournalStore) -> None:
    count = 1100
    for number in range(count):
        run = a_run(f"r{number}", events=1)
        busy = run.state.model_copy(update={"active_microvm_count": 1, "active_stage_count": 2})
        store.create(run.model_copy(update={"state": busy}), number)
    assert store.active_counts() == (count, 2 * count)
    store.append(a_batch("r0", first=1, outcome=SUCCEEDED))
    assert store.active_counts() == (count - 1, 2 * (count - 1))


def test_events_are_read_after_a_seq_and_by_stream(store: JournalStore) -> None:
    store.create(a_run(), 1)
    store.append(a_batch(first=2, count=4))
    assert [e.seq for e in store.events("r1", after=3, limit=10)] == [4, 5]
    assert [e.seq for e in store.events("r1", after=-1, limit=2, stream="stdout")] == [2, 3]


def test_the_events_of_its_stages_are_found_among_all_of_a_run(store: JournalStore) -> None:
    store.create(a_run(), 1)
    maker = EventMaker("r1", "mock", 2)
    events = (
        maker.make("stage.queued", "a queued", stage="a"),
        maker.make("log.chunk", "stage.queued", stage="a", stream="stdout"),
        maker.make("log.cut", "cut", stage="a"),
        maker.make("stage.started", "a started", stage="a"),
    )
    store.append(AppendEvents(run_id="r1", generation=1, events=events))
    assert store.stage_events("r1") == (events[0], events[3])
    assert store.stage_events("nobody") == ()


def test_an_unknown_run_is_named(store: JournalStore) -> None:
    with pytest.raises(NoSuchRun, match="nobody"):
        store.run("nobody")


def test_everything_is_there_after_it_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    first = JournalStore(path)
    first.create(a_run(), 1)
    first.append(a_batch(first=2, count=2))
    first.close()
    second = JournalStore(path)
    assert seqs(second) == [0, 1, 2, 3]
    second.close()


def test_a_journal_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(JournalError, match=r"schema 99.*--state-dir"):
        JournalStore(path)


def test_a_file_that_is_no_journal_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(JournalError, match="move it away"):
        JournalStore(path)


def test_a_full_disk_is_an_error_that_loses_nothing(store: JournalStore) -> None:
    store.create(a_run(), 1)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalError, match="full; free space"):
        store.append(a_batch(first=2, count=900))
    assert seqs(store) == [0, 1]
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.append(a_batch(first=2, count=900))
    assert store.run("r1").last_seq == 901


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 4)), max_size=25))
def test_whatever_batches_come_the_events_have_no_gap(batches: list[tuple[int, int]]) -> None:
    store = JournalStore(Path(":memory:"))
    store.create(a_run(), 1)
    for first, count in batches:
        before = store.run("r1").last_seq
        try:
            store.append(a_batch(first=first, count=count))
        except JournalConflict:
            assert first > before + 1
        assert store.run("r1").last_seq >= before
        assert seqs(store) == list(range(store.run("r1").last_seq + 1))
    store.close()
