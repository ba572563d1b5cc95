"""Reads runs from the journal, those that are wanted at one moment with one question."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from voidbus.actors.messages.runs import ReadRuns, RunsRead
from voidbus.gateway.bus import Bus
from voidbus.gateway.feed import JOURNAL
from voidbus.gateway.problems import Code, Problem

# What `ReadRuns` takes.
_AT_ONCE = 64


@dataclass(frozen=True)
class KeptRun:
    """A run as it is kept. `events` are the first of them, a line each; `last` is the seq of the
    last of those, `last_seq` that of the newest there is."""

    state: bytes
    events: bytes
    last: int
    last_seq: int


class RunReader:
    """What is wanted while a question is under way goes together in the next. So nobody is given
    what was read before they asked, and many clients cost the bus little more than one. Lives in
    one event loop."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self._wanted: dict[str, list[asyncio.Future[KeptRun]]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def read(self, run_id: str) -> KeptRun:
        """A run as it is now. Raises Problem."""
        answer: asyncio.Future[KeptRun] = self._loop.create_future()
        self._wanted.setdefault(run_id, []).append(answer)
        if self._asking is None:
            self._asking = self._loop.create_task(self._ask())
        return await answer

    async def _ask(self) -> None:
        try:
            while self._wanted:
                run_ids = tuple(self._wanted)[:_AT_ONCE]
                wanted = {run_id: self._wanted.pop(run_id) for run_id in run_ids}
                try:
                    reply, attachments = await self._bus.read(
                        JOURNAL, ReadRuns(run_ids=run_ids), RunsRead
                    )
                except Problem as problem:
                    for answers in wanted.values():
                        _fail(answers, problem.code, str(problem), problem.status)
                    continue
                parts = iter(attachments)
                for read in reply.runs:
                    answers = wanted.pop(read.run_id)
                    if read.found:
                        kept = KeptRun(next(parts), next(parts), read.last, read.last_seq)
                        for answer in answers:
                            if not answer.done():  # its client may have gone away
                                answer.set_result(kept)
                    else:
                        _fail(answers, Code.NOT_FOUND, f"run '{read.run_id}' not found")
                for run_id, answers in wanted.items():  # what had no room in the reply
                    self._wanted.setdefault(run_id, []).extend(answers)
        finally:
            self._asking = None


def _fail(
    answers: list[asyncio.Future[KeptRun]], code: Code, message: str, status: int | None = None
) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_exception(Problem(code, message, status))
