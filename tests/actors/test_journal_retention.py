"""What the journal forgets and when, what it lists of files, and journals of earlier releases."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_kit import a_batch, a_run

from voidbus.actors.journal_schema import SCHEMA_VERSION
from voidbus.actors.journal_store import JournalStore, NoSuchRun
from voidbus.actors.messages.artifacts import StoredArtifact
from voidbus.actors.messages.journal import RunOutcome
from voidbus.actors.messages.runs import RunStatus

SUCCEEDED = RunOutcome(status=RunStatus.SUCCEEDED)


class Clock:
    """Milliseconds, set by the test."""

    def __init__(self) -> None:
        self.now = 1000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[JournalStore]:
    opened = JournalStore(tmp_path / "journal.sqlite", clock)
    yield opened
    opened.close()


def kept(stage: str, name: str, digest: str, size: int = 10) -> StoredArtifact:
    return StoredArtifact(
        stage=stage, name=name, media_type="text/plain", size_bytes=size, digest=digest
    )


def ended(store: JournalStore, run_id: str, *artifacts: StoredArtifact) -> None:
    store.create(a_run(run_id), 1)
    batch = a_batch(run_id, first=2, outcome=SUCCEEDED)
    store.append(batch.model_copy(update={"artifacts": artifacts}))


def test_only_runs_that_ended_before_are_forgotten_oldest_first(
    store: JournalStore, clock: Clock
) -> None:
    store.create(a_run("going"), 1)
    for number, run_id in enumerate(("a", "b", "c")):
        clock.now = 1000 * (number + 1)
        ended(store, run_id)
    assert store.prunable(2500, None, 10).runs == ("a", "b")
    pruned = store.prune(2500, None, 1)
    assert (pruned.runs, pruned.more) == (("a",), True)
    pruned = store.prune(2500, None, 10)
    assert (pruned.runs, pruned.more) == (("b",), False)
    assert store.prune(None, None, 10).runs == ()
    assert {run.id for run in store.runs(active=None, limit=10)[0]} == {"going", "c"}
    with pytest.raises(NoSuchRun):
        store.run("a")
    assert store.events("a", after=-1, limit=10) == ()


def test_the_oldest_go_until_the_rest_is_small_enough(store: JournalStore, clock: Clock) -> None:
    for number, run_id in enumerate(("a", "b", "c")):
        clock.now = 1000 * (number + 1)
        ended(store, run_id, kept("s", "", "d" * 64, size=1_000_000))
    pruned = store.prune(None, 2_500_000, 10)
    assert pruned.runs == ("a",)
    assert 1_000_000 < pruned.size < 1_100_000, "its events count too"
    assert store.prune(None, 2_500_000, 10).runs == ()
    assert store.prune(None, 0, 10).runs == ("b", "c")


def test_a_file_published_anew_counts_once(store: JournalStore) -> None:
    store.create(a_run("a"), 1)
    for number, size in enumerate((500_000, 700_000)):
        batch = a_batch("a", first=2 + number, count=1)
        artifact = kept("s", "", str(number) * 64, size)
        store.append(batch.model_copy(update={"artifacts": (artifact,)}))
    store.append(a_batch("a", first=4, outcome=SUCCEEDED))
    assert 700_000 < store.prunable(None, 0, 10).size < 800_000
    (listed,) = store.artifacts("a", 10)
    assert listed.digest == "1" * 64
    assert store.unlisted(["0" * 64, "1" * 64]) == ("0" * 64,)


def test_files_are_found_by_stage_and_name(store: JournalStore) -> None:
    ended(store, "a", kept("s", "", "a" * 64), kept("s", "x", "b" * 64), kept("t", "x", "c" * 64))
    found = store.artifact("a", "t", "x")
    assert found is not None
    assert found.digest == "c" * 64
    assert store.artifact("a", "s", "y") is None
    assert [(each.stage, each.name) for each in store.artifacts("a", 10)] == [
        ("s", ""),
        ("s", "x"),
        ("t", "x"),
    ]


def test_events_are_found_by_their_id(store: JournalStore) -> None:
    store.create(a_run("a", events=3), 1)
    events = store.events("a", after=-1, limit=10)
    assert store.seq_of("a", events[1].event_id) == 1
    assert store.seq_of("a", "nope") is None


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)
@given(after=st.integers(-1, 12), limit=st.integers(1, 12), size=st.integers(1, 5000))
def test_pages_of_raw_events_are_in_order_and_never_empty_while_there_are_more(
    tmp_path_factory: pytest.TempPathFactory, after: int, limit: int, size: int
) -> None:
    store = JournalStore(tmp_path_factory.mktemp("j") / "journal.sqlite")
    try:
        store.create(a_run("a", events=10), 1)
        bodies, last = store.raw_events("a", after=after, limit=limit, stream=None, max_bytes=size)
        seqs = [json.loads(body)["seq"] for body in bodies]
        assert seqs == list(range(after + 1, after + 1 + len(seqs)))
        assert last == (seqs[-1] if seqs else after)
        assert bool(seqs) == (after < 9)
        assert len(seqs) <= limit
    finally:
        store.close()


def test_a_session_keeps_its_newest_messages(store: JournalStore) -> None:
    for number in range(5):
        store.add_to_session("s", str(number), limit=3)
    store.add_to_session("other", "x", limit=3)
    assert store.session("s") == ["2", "3", "4"]
    assert store.session("none") == []


def test_runs_are_counted_by_their_status(store: JournalStore) -> None:
    store.create(a_run("a"), 1)
    ended(store, "b")
    assert store.counts() == {"running": 1, "succeeded": 1}


# -- an earlier release ------------------------------------------------------------------------

VERSION_1 = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY,
    created INTEGER NOT NULL,
    active INTEGER NOT NULL,
    state TEXT NOT NULL,
    process TEXT NOT NULL,
    intents TEXT NOT NULL DEFAULT '[]'
) STRICT;
CREATE INDEX runs_by_activity ON runs (active, created);
CREATE TABLE events (
    run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
    seq INTEGER NOT NULL,
    stream TEXT,
    body TEXT NOT NULL,
    PRIMARY KEY (run_id, seq)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;
"""


def test_a_journal_of_the_first_version_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    run = a_run("old", events=2)
    ended_state = run.state.model_copy(update={"status": RunStatus.SUCCEEDED, "last_seq": 1})
    db = sqlite3.connect(path)
    db.executescript(VERSION_1)
    for run_id, state, active in (("old", ended_state, 0), ("going", run.state, 1)):
        renamed = state.model_copy(update={"id": run_id, "last_seq": 1})
        db.execute(
            "INSERT INTO runs (id, created, active, state, process) VALUES (?, 7, ?, ?, ?)",
            (run_id, active, renamed.model_dump_json(), run.process.model_dump_json()),
        )
        for event in run.events:
            db.execute(
                "INSERT INTO events VALUES (?, ?, NULL, ?)",
                (run_id, event.seq, event.model_dump_json()),
            )
    db.commit()
    db.close()
    store = JournalStore(path)
    try:
        assert store.seq_of("old", run.events[1].event_id) == 1
        assert store.prunable(8, None, 10).runs == ("old",)
        assert store.prunable(None, 0, 10).size > 0
        assert store.artifacts("old", 10) == ()
        store.append(a_batch("going", first=2, outcome=SUCCEEDED))
        assert store.run("going").status is RunStatus.SUCCEEDED
    finally:
        store.close()
    check = sqlite3.connect(path)
    assert check.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    check.close()


def test_what_is_forgotten_gives_its_room_back(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "journal.sqlite"
    store = JournalStore(path, clock)
    store.create(a_run("big"), 1)
    for first in range(2, 3000, 900):
        store.append(a_batch("big", first=first, count=900))
    state = store.run("big")
    store.append(a_batch("big", first=state.last_seq + 1, outcome=SUCCEEDED))
    store.close()
    before = path.stat().st_size
    store = JournalStore(path, clock)
    store.prune(clock.now + 1, None, 10)
    store.close()
    assert path.stat().st_size < before / 4
