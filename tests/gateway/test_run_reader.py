"""Runs that are wanted at one moment are read with one question, and never too early."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar

import pytest

from voidbus.actors.messages.runs import ReadRuns, RunRead, RunsRead
from voidbus.gateway.bus import ASK_TIMEOUT, Bus
from voidbus.gateway.problems import Code, Problem
from voidbus.gateway.run_reader import KeptRun, RunReader
from voidbus.transport.message import Message

M = TypeVar("M", bound=Message)
LONG = 20.0


class Journal(Bus):
    """Answers each question when the test says so, with the number of the question; `room` is how
    many runs fit into an answer. It knows no run whose name starts with "no"."""

    def __init__(self, room: int = 64) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.room = room
        self.failing: Problem | None = None
        self._allowed = asyncio.Semaphore(0)
        self._changed = asyncio.Condition()

    def allow(self, questions: int = 1) -> None:
        for _ in range(questions):
            self._allowed.release()

    async def wait_asked(self, questions: int) -> None:
        async with asyncio.timeout(LONG), self._changed:
            await self._changed.wait_for(lambda: len(self.asked) >= questions)

    async def read(
        self, dest: str, message: Message, reply: type[M], timeout: float = ASK_TIMEOUT
    ) -> tuple[M, Sequence[bytes]]:
        assert isinstance(message, ReadRuns)
        self.asked.append(message.run_ids)
        number = len(self.asked)
        async with self._changed:
            self._changed.notify_all()
        await self._allowed.acquire()
        if self.failing is not None:
            raise self.failing
        runs, attachments = [], []
        for run_id in message.run_ids[: self.room]:
            found = not run_id.startswith("no")
            runs.append(RunRead(run_id=run_id, found=found, last=number, last_seq=number))
            attachments += [run_id.encode(), b"events"] if found else []
        answer = RunsRead(runs=tuple(runs))
        assert isinstance(answer, reply)
        return answer, attachments


async def read(reader: RunReader, run_id: str) -> KeptRun:
    async with asyncio.timeout(LONG):
        return await reader.read(run_id)


def test_what_is_wanted_while_a_question_is_under_way_goes_together_in_the_next() -> None:
    async def scenario() -> None:
        journal = Journal()
        reader = RunReader(journal)
        first = asyncio.create_task(read(reader, "a"))
        await journal.wait_asked(1)
        # The run may have changed since the first question was put.
        later = [asyncio.create_task(read(reader, name)) for name in ("a", "b", "a", "none")]
        journal.allow(2)
        assert (await first).last == 1
        found = await asyncio.gather(*later, return_exceptions=True)
        assert [each.state for each in found if isinstance(each, KeptRun)] == [b"a", b"b", b"a"]
        assert all(each.last == 2 for each in found if isinstance(each, KeptRun))
        assert isinstance(found[3], Problem)
        assert (found[3].code, str(found[3])) == (Code.NOT_FOUND, "run 'none' not found")
        assert journal.asked == [("a",), ("a", "b", "none")]

    asyncio.run(scenario())


def test_what_had_no_room_in_an_answer_is_asked_for_again() -> None:
    async def scenario() -> None:
        journal = Journal(room=3)
        reader = RunReader(journal)
        names = [f"run{number}" for number in range(8)]
        journal.allow(len(names))
        found = await asyncio.gather(*(read(reader, name) for name in names))
        assert [each.state.decode() for each in found] == names
        assert [len(asked) for asked in journal.asked] == [8, 5, 2]

    asyncio.run(scenario())


def test_one_question_is_never_for_more_runs_than_the_journal_takes() -> None:
    async def scenario() -> None:
        journal = Journal()
        reader = RunReader(journal)
        names = [f"run{number}" for number in range(150)]
        journal.allow(len(names))
        found = await asyncio.gather(*(read(reader, name) for name in names))
        assert [each.state.decode() for each in found] == names
        assert [len(asked) for asked in journal.asked] == [64, 64, 22]

    asyncio.run(scenario())


def test_a_journal_that_does_not_answer_is_everybodys_problem_and_the_next_are_read_again() -> None:
    async def scenario() -> None:
        journal = Journal()
        reader = RunReader(journal)
        journal.failing = Problem(Code.RETRIEVAL_TIMEOUT, "no answer")
        journal.allow()
        found = await asyncio.gather(
            *(read(reader, name) for name in ("a", "b", "a")), return_exceptions=True
        )
        assert [str(each) for each in found] == ["no answer"] * 3
        assert len({id(each) for each in found}) == 3, "each has a traceback of its own"
        journal.failing = None
        journal.allow()
        assert (await read(reader, "a")).state == b"a"

    asyncio.run(scenario())


def test_a_client_that_goes_away_takes_nothing_from_the_others() -> None:
    async def scenario() -> None:
        journal = Journal()
        reader = RunReader(journal)
        gone = asyncio.create_task(read(reader, "a"))
        stays = asyncio.create_task(read(reader, "a"))
        await journal.wait_asked(1)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        journal.allow()
        assert (await stays).state == b"a"

    asyncio.run(scenario())
