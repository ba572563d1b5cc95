"""Admission: from a request to start a run to that run in the journal, and who else asked for it.

Nothing is started here: whoever is told of an admitted run starts it.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Container
from dataclasses import dataclass

from voidbus.actors.launch import Launch, LaunchRefused, prepare
from voidbus.actors.messages.actor import detail_of
from voidbus.actors.messages.journal import Appended, CreateRun, ProcessRecord
from voidbus.actors.messages.runs import InspectRun, RunAccepted, RunState, StartRun, is_run_id
from voidbus.actors.runtime.actor import Refuse
from voidbus.actors.runtime.supervisor import Supervisor
from voidbus.transport.admission import token_digest
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

log = logging.getLogger("voidbus.actors")

_ASK_TIMEOUT = 15.0
# When as many specifications are being read as may be, one more waits its turn (seconds).
_TURN_SECONDS = 0.02


@dataclass(frozen=True)
class Admitted:
    """A run that is journaled. The token is what its process joins the bus with."""

    launch: Launch
    state: RunState
    generation: int
    token: str

    @property
    def digest(self) -> bytes:
        return token_digest(self.token)


class Admission:
    """Used by the runs actor, in its thread. `active` are the runs that have not ended, `limit` how
    many there may be."""

    def __init__(
        self,
        actor: Supervisor,
        journal: str,
        *,
        active: Container[str],
        count_active: Callable[[], int],
        limit: int,
        on_admitted: Callable[[Admitted], None],
    ) -> None:
        self._actor = actor
        self._journal = journal
        self._active = active
        self._count_active = count_active
        self._limit = limit
        self._on_admitted = on_admitted
        self._under_way: dict[str, list[Delivery]] = {}  # and who else asked for that run meanwhile
        self._last_number = 0  # of the ids given to runs without one
        self.closed = False

    def __len__(self) -> int:
        """Runs on their way in."""
        return len(self._under_way)

    def begin(self, message: StartRun, delivery: Delivery) -> None:
        """Take a request in, or refuse it."""
        if message.run_id is None:
            self._admit(message, self._new_run_id(), delivery)
            return
        run_id = message.run_id
        if not is_run_id(run_id):
            problem = f"run id {run_id[:40]!r}: use 1 to 100 of A-Z a-z 0-9 . _ - only"
            delivery.fail(FaultReason.INVALID, problem)
            return

        def looked_up(outcome: Message) -> None:
            if isinstance(outcome, RunState):
                _answer_existing(outcome, delivery)
            elif isinstance(outcome, Fault) and outcome.reason is FaultReason.NO_SUCH_ACTOR:
                self._admit(message, run_id, delivery)
            else:
                delivery.fail(FaultReason.FAILED, detail_of(outcome))

        inspect = InspectRun(run_id=run_id)
        self._actor.ask(self._journal, inspect, looked_up, timeout=_ASK_TIMEOUT)

    def _refusal(self) -> tuple[FaultReason, str] | None:
        """Why there may be no new run now."""
        if self.closed:
            return FaultReason.REFUSED, "the supervisor is stopping and takes no new runs"
        if self._count_active() + len(self._under_way) >= self._limit:
            return (
                FaultReason.OVERLOADED,
                f"{self._limit} runs are active, as max_parallel_runs allows; wait, or raise it",
            )
        return None

    def _new_run_id(self) -> str:
        # Never one given before: that run may have ended already, and be in the journal only.
        number = max(time.time_ns() // 1_000_000, self._last_number + 1)
        while f"run-{number}" in self._active or f"run-{number}" in self._under_way:
            number += 1
        self._last_number = number
        return f"run-{number}"

    def _admit(self, message: StartRun, run_id: str, delivery: Delivery) -> None:
        """Take in a run there is none of yet; who asks for one that is being taken in waits too,
        however many there are."""
        if run_id in self._under_way:
            self._under_way[run_id].append(delivery)
            return
        refusal = self._refusal()
        if refusal is not None:
            delivery.fail(*refusal)
            return
        self._under_way[run_id] = []
        self._read_spec(message, run_id, delivery)

    def _read_spec(self, message: StartRun, run_id: str, delivery: Delivery) -> None:
        def loaded(outcome: Launch | Exception) -> None:
            if isinstance(outcome, Launch):
                self._create(outcome, delivery)
                return
            known = isinstance(outcome, LaunchRefused)
            if not known:
                log.error("starting run %s: %s", run_id, outcome)
            reason = FaultReason.INVALID if known else FaultReason.FAILED
            for asked in (delivery, *self._under_way.pop(run_id, ())):
                asked.fail(reason, str(outcome))

        try:
            self._actor.work(lambda: prepare(message, run_id), loaded, name=f"load-{run_id}")
        except Refuse:  # it keeps its id meanwhile
            self._actor.after(_TURN_SECONDS, lambda: self._read_spec(message, run_id, delivery))

    def _create(self, launch: Launch, delivery: Delivery) -> None:
        """Journal the run; only then is anything started."""
        generation = self._actor.next_generation()
        state = launch.state.model_copy(update={"generation": generation})
        admitted = Admitted(launch, state, generation, secrets.token_hex(32))
        process = ProcessRecord(generation=generation, token_digest=admitted.digest.hex())

        def created(outcome: Message) -> None:
            others = self._under_way.pop(launch.run_id, [])
            if not isinstance(outcome, Appended):
                detail = f"the run was not started: {detail_of(outcome)}"
                for asked in (delivery, *others):
                    asked.fail(FaultReason.FAILED, detail)
                return
            for asked in others:
                _answer_existing(state, asked)
            delivery.reply(
                RunAccepted(
                    run_id=launch.run_id,
                    attempt_id=1,
                    state=state.status,
                    warnings=launch.warnings,
                )
            )
            self._on_admitted(admitted)

        create = CreateRun(state=state, process=process, events=launch.events)
        self._actor.ask(self._journal, create, created, timeout=_ASK_TIMEOUT)


def _answer_existing(state: RunState, delivery: Delivery) -> None:
    if state.status.terminal:
        ended = f"run {state.id} has already ended ({state.status.value})"
        delivery.fail(FaultReason.STALE, ended)
        return
    delivery.reply(
        RunAccepted(run_id=state.id, attempt_id=state.attempt_id, state=state.status, existing=True)
    )
