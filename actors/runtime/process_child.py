"""A process as a supervisor's child: the stop ladder, carried out on a process.

Drain (ask it over the bus), terminate (SIGTERM), kill (SIGKILL), within one total deadline; the
step that ended it is recorded.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable

from voidbus.actors.runtime.actor import Actor, Timer
from voidbus.actors.runtime.ladder import Done, Step, StopLadder
from voidbus.actors.runtime.process import ProcessGoneError, ProcessHandle
from voidbus.actors.runtime.supervisor import Child


class ProcessChild(Child):
    """One process, from before it is there until it is gone.

    Its owner calls `attach` when it was started and `gone` when it has ended, which closes the
    handle. `ask_to_end(seconds)` is the polite request, sent over the bus. All of it is for the
    owner's thread.
    """

    def __init__(self, owner: Actor, ask_to_end: Callable[[float], None]) -> None:
        self._owner = owner
        self._ask_to_end = ask_to_end
        self._ladder: StopLadder | None = None
        self._step: Step | None = None
        self._timer: Timer | None = None
        self._gone = False
        self.handle: ProcessHandle | None = None
        self.stopped_by: Done | None = None

    def attach(self, handle: ProcessHandle) -> None:
        """The process is there. A stop that was asked for meanwhile goes on with it."""
        self.handle = handle
        if self._gone:
            handle.close()
        elif self._step is not None:
            self._do(self._step)

    def stop(self, timeout: float) -> None:
        """Begin the ladder; a second call can only shorten it. Nothing where it is gone."""
        if self._gone:
            return
        now = self._owner.system.clock()
        if self._ladder is None:
            # The drain has most of the time: a cancel's grace and the machine's stop are in it.
            self._ladder = StopLadder(timeout, drain=0.8, tell=0.0, terminate=0.1)
            self._climb(self._ladder.begin(now))
        else:
            self._ladder.shorten(now, timeout)
            self._advance()

    def gone(self) -> None:
        """The process has ended, or was never there. A second call has no effect."""
        self._gone = True
        if self._timer is not None:
            self._timer.cancel()
        if self._ladder is not None:
            end = self._ladder.advance(self._owner.system.clock(), gone=True)
            self.stopped_by = end if isinstance(end, Done) else None
        if self.handle is not None:
            self.handle.close()

    def _advance(self) -> None:
        assert self._ladder is not None
        step = self._ladder.advance(self._owner.system.clock(), gone=False)
        if isinstance(step, Step):
            self._climb(step)

    def _climb(self, step: Step) -> None:
        """Be on `step`: carry it out if it is new, and look again when its time is up.

        Where the process is not there yet, `attach` carries out the step it is on by then.
        """
        assert self._ladder is not None
        if step is not self._step:
            self._step = step
            if self.handle is not None:
                self._do(step)
        if self._timer is not None:
            self._timer.cancel()
        next_at = self._ladder.next_at
        if step is not Step.KILL and next_at is not None:
            remaining = max(0.0, next_at - self._owner.system.clock())
            self._timer = self._owner.after(remaining, self._advance)

    def _do(self, step: Step) -> None:
        assert self._ladder is not None
        assert self.handle is not None
        if step is Step.DRAIN or step is Step.TELL:
            next_at = self._ladder.next_at or 0.0
            self._ask_to_end(max(0.0, next_at - self._owner.system.clock()))
            return
        sent = signal.SIGTERM if step is Step.TERMINATE else signal.SIGKILL
        with contextlib.suppress(ProcessGoneError):
            self.handle.signal(sent)
