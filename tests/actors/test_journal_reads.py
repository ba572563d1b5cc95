"""Several runs read from the journal with one question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from actor_kit import ask, local_system, reply
from journal_kit import a_batch, a_run

from voidbus.actors.journal import Journal
from voidbus.actors.messages.journal import PruneRuns, RunOutcome, RunsPruned
from voidbus.actors.messages.runs import ReadRuns, RunEvent, RunRead, RunsRead, RunState, RunStatus
from voidbus.actors.runtime.system import System
from voidbus.transport.message import Message

SUCCEEDED = RunOutcome(status=RunStatus.SUCCEEDED)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    with local_system() as made:
        made.start(Journal, "journal", tmp_path / "journal.sqlite", "here/runs")
        yield made


def put(system: System, message: Message) -> None:
    ask(system, "journal", message).wait()


def read(system: System, *run_ids: str) -> tuple[tuple[RunRead, ...], Sequence[bytes]]:
    asked = ask(system, "journal", ReadRuns(run_ids=run_ids))
    return reply(asked, RunsRead).runs, asked.attachments


def seqs(events: bytes) -> list[int]:
    return [RunEvent.model_validate_json(line).seq for line in events.split(b"\n")]


def test_each_run_comes_with_its_state_and_its_events_and_one_there_is_not_is_told(
    system: System,
) -> None:
    put(system, a_run("one"))
    put(system, a_run("two", events=3))
    runs, attachments = read(system, "one", "nobody", "two")
    assert [(run.run_id, run.found, run.last, run.last_seq) for run in runs] == [
        ("one", True, 1, 1),
        ("nobody", False, -1, -1),
        ("two", True, 2, 2),
    ]
    first, first_events, second, second_events = attachments
    assert [RunState.from_json(state).id for state in (first, second)] == ["one", "two"]
    assert (seqs(first_events), seqs(second_events)) == ([0, 1], [0, 1, 2])


def test_what_is_read_is_what_was_written_last_also_after_the_end(system: System) -> None:
    put(system, a_run("r"))
    assert read(system, "r")[0][0].last_seq == 1
    put(system, a_batch("r", first=2))
    assert read(system, "r")[0][0].last_seq == 2
    put(system, a_batch("r", first=3, count=0, outcome=SUCCEEDED))
    for _ in range(3):
        (run,), (state, events) = read(system, "r")
        assert (run.last, run.last_seq) == (3, 3)
        assert RunState.from_json(state).status is RunStatus.SUCCEEDED
        assert seqs(events) == [0, 1, 2, 3]


def test_a_run_that_was_pruned_is_not_found_though_it_was_read_before(system: System) -> None:
    put(system, a_run("r"))
    put(system, a_batch("r", first=2, outcome=SUCCEEDED))
    assert read(system, "r")[0][0].found
    pruned = ask(system, "journal", PruneRuns(before_ms=None, max_bytes=0))
    assert reply(pruned, RunsPruned).runs == ("r",)
    assert read(system, "r") == ((RunRead(run_id="r", found=False),), [])


def test_runs_that_one_message_does_not_hold_are_left_to_the_next_question(system: System) -> None:
    names = [f"r{number}" for number in range(8)]
    for name in names:
        put(system, a_run(name, events=0))
        put(system, a_batch(name, first=0, count=900))
    left, asked = list(names), 0
    while left:
        runs, attachments = read(system, *left)
        assert sum(map(len, attachments)) < 4_000_000, "a message"
        assert [run.run_id for run in runs] == left[: len(runs)]
        for run, events in zip(runs, attachments[1::2], strict=True):
            assert seqs(events) == list(range(run.last + 1))
            assert run.last_seq == 899
        left, asked = left[len(runs) :], asked + 1
    assert 1 < asked < len(names)


def test_a_run_with_many_events_comes_with_the_first_of_them(system: System) -> None:
    put(system, a_run("r", events=0))
    for first in (0, 750):
        put(system, a_batch("r", first=first, count=750))
    put(system, a_batch("r", first=1500, count=0, outcome=SUCCEEDED))
    for _ in range(2):
        (run,), (_, events) = read(system, "r")
        assert (run.last, run.last_seq) == (999, 1500)
        assert seqs(events) == list(range(1000))
