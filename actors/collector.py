"""The collector: brings a run whose process is gone to its outcome in the journal.

What can't be done now (a full disk, a journal that is being restarted) is tried again until it
can: a run must not stay active for ever, nor lose what it spooled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from voidbus.actors.messages.actor import detail_of
from voidbus.actors.messages.journal import Appended, AppendEvents, ReadStages, StageEvents
from voidbus.actors.messages.runs import InspectRun, RunEvent, RunState
from voidbus.actors.recovery import Recovered, recover, remove_directory
from voidbus.actors.run_record import RunRecord
from voidbus.actors.runtime.actor import Actor, Refuse
from voidbus.transport.message import Message

log = logging.getLogger("voidbus.actors")

_ASK_TIMEOUT = 15.0
_RETRY_SECONDS = 1.0
# When as many jobs are under way as may be, this one waits its turn (seconds).
_TURN_SECONDS = 0.02


class Collector:
    """Used by one actor, in its thread. `journal` is the journal's address."""

    def __init__(self, actor: Actor, runs_dir: Path, journal: str) -> None:
        self._actor = actor
        self._runs_dir = runs_dir
        self._journal = journal

    def collect(self, run: RunRecord, reason: str, on_ended: Callable[[], None]) -> None:
        """Find the run's outcome, or make one of `reason`; `on_ended` when it is journaled."""

        def looked_up(outcome: Message) -> None:
            if not isinstance(outcome, RunState):
                self._again(run, outcome, lambda: self.collect(run, reason, on_ended))
            elif outcome.status.terminal:
                on_ended()
            else:
                read_stages(outcome)

        def read_stages(state: RunState) -> None:
            def read(outcome: Message) -> None:
                if isinstance(outcome, StageEvents):
                    self._recover(run, state, outcome.events, reason, on_ended)
                else:
                    self._again(run, outcome, lambda: self.collect(run, reason, on_ended))

            stages = ReadStages(run_id=run.run_id)
            self._actor.ask(self._journal, stages, read, timeout=_ASK_TIMEOUT)

        inspect = InspectRun(run_id=run.run_id)
        self._actor.ask(self._journal, inspect, looked_up, timeout=_ASK_TIMEOUT)

    def remove(self, run_id: str) -> None:
        """Remove what an ended run has on disk."""
        try:
            self._actor.work(
                lambda: remove_directory(self._runs_dir / run_id), lambda _: None, name="remove"
            )
        except Refuse:
            self._actor.after(_TURN_SECONDS, lambda: self.remove(run_id))

    def append(
        self, run_id: str, batches: tuple[AppendEvents, ...], then: Callable[[], None]
    ) -> None:
        """Journal batches one by one."""
        if not batches:
            then()
            return

        def appended(outcome: Message) -> None:
            if isinstance(outcome, Appended):
                self.append(run_id, batches[1:], then)
            else:
                log.error("run %s: %s; trying again", run_id, detail_of(outcome))
                self._actor.after(_RETRY_SECONDS, lambda: self.append(run_id, batches, then))

        self._actor.ask(self._journal, batches[0], appended, timeout=_ASK_TIMEOUT)

    def _recover(
        self,
        run: RunRecord,
        state: RunState,
        stage_events: tuple[RunEvent, ...],
        reason: str,
        on_ended: Callable[[], None],
    ) -> None:
        directory = self._runs_dir / run.run_id
        cancel_reason = run.cancel_reason

        def again() -> None:
            self._recover(run, state, stage_events, reason, on_ended)

        def recovered(outcome: Recovered | Exception) -> None:
            if isinstance(outcome, Exception):
                log.error("run %s: cleaning up: %s; trying again", run.run_id, outcome)
                self._actor.after(_RETRY_SECONDS, again)
            else:
                self.append(run.run_id, outcome.batches, on_ended)

        try:
            self._actor.work(
                lambda: recover(
                    state,
                    directory,
                    reason=reason,
                    cancel_reason=cancel_reason,
                    stage_events=stage_events,
                ),
                recovered,
                name=f"recover-{run.run_id}",
            )
        except Refuse:
            self._actor.after(_TURN_SECONDS, again)

    def _again(self, run: RunRecord, outcome: Message, retry: Callable[[], None]) -> None:
        log.error("run %s: %s; trying again", run.run_id, detail_of(outcome))
        self._actor.after(_RETRY_SECONDS, retry)
