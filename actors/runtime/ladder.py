"""The stop ladder: drain, tell, terminate, kill, each with its share of one total time.

A pure state machine: it is told the time and whether the process is gone, and says which step to
be on. What a step does (stop taking work, send a stop message, SIGTERM, SIGKILL) is its owner's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

# A killed process still needs time to die and to be reaped; less than a twentieth of the usual
# 10 s stop is less than a busy machine takes to free a VM's memory.
MINIMUM_KILL_SHARE = 0.05


class Step(StrEnum):
    """What is done to end it, from the kindest to the last."""

    DRAIN = "drain"
    TELL = "tell"
    TERMINATE = "terminate"
    KILL = "kill"


class StopOutcome(StrEnum):
    """The step that worked. `SURVIVED`: even kill had shown no effect when the time was up."""

    DRAINED = "drained"
    TOLD = "told"
    TERMINATED = "terminated"
    KILLED = "killed"
    SURVIVED = "survived"


_OUTCOMES = {
    Step.DRAIN: StopOutcome.DRAINED,
    Step.TELL: StopOutcome.TOLD,
    Step.TERMINATE: StopOutcome.TERMINATED,
    Step.KILL: StopOutcome.KILLED,
}


@dataclass(frozen=True, slots=True)
class Done:
    """The ladder's end: the last step used, what came of it, and the seconds it all took."""

    step_used: Step
    outcome: StopOutcome
    elapsed: float


class StopLadder:
    """One stop, within `total` seconds.

    `drain`, `tell` and `terminate` are their fractions of the total; 0 leaves the step out. The
    kill has the rest, which must be at least `MINIMUM_KILL_SHARE`. With a total of 0 the first
    step is the kill.

    Raises ValueError for a total or fractions that make no sense, RuntimeError when `advance` or
    `shorten` is called before `begin`, or `begin` twice.
    """

    def __init__(
        self, total: float, *, drain: float = 0.5, tell: float = 0.2, terminate: float = 0.2
    ) -> None:
        if not (math.isfinite(total) and total >= 0):
            raise ValueError(f"the total must be a finite number of seconds, 0 or more: {total}")
        fractions = (drain, tell, terminate)
        kill = 1 - math.fsum(fractions)
        # The margin is float rounding, so that 0.5 + 0.25 + 0.2 leaves a twentieth.
        if min(fractions) < 0 or not kill >= MINIMUM_KILL_SHARE - 1e-9:
            raise ValueError(
                f"drain, tell and terminate must be 0 or more and leave {MINIMUM_KILL_SHARE:g} of "
                f"the total to the kill, not {drain}, {tell} and {terminate}"
            )
        steps = (Step.DRAIN, Step.TELL, Step.TERMINATE, Step.KILL)
        shares = (*fractions, kill)
        self._shares = [(step, share) for step, share in zip(steps, shares, strict=True) if share]
        self._total = total
        self._began: float | None = None
        self._end = math.inf
        self._slots: Sequence[tuple[Step, float]] = ()
        self._done: Done | None = None

    @property
    def done(self) -> Done | None:
        """How it ended, once it has."""
        return self._done

    @property
    def step(self) -> Step | None:
        """The step it is on; None before `begin` and after the end."""
        return self._slots[0][0] if self._slots and self._done is None else None

    @property
    def next_at(self) -> float | None:
        """When `advance` is next due if the process isn't gone before; None when it's over."""
        return self._slots[0][1] if self._slots and self._done is None else None

    def begin(self, now: float) -> Step:
        """Start the clock; the first step."""
        if self._began is not None:
            raise RuntimeError("this stop has begun already; a ladder serves one stop")
        self._began = now
        self._end = now + self._total
        self._slots = _split(self._shares, now, self._end)
        self._skip_passed(now)
        return self._slots[0][0]

    def advance(self, now: float, gone: bool) -> Step | Done:
        """The step to be on now (a late call may pass some over), or how it ended.

        The kill is never passed over: when its time is up too, the outcome is `SURVIVED`.
        """
        began = self._running_since()
        if self._done is None:
            step = self._slots[0][0]
            if gone:
                self._done = Done(step, _OUTCOMES[step], now - began)
            elif step is Step.KILL and now >= self._end:
                self._done = Done(step, StopOutcome.SURVIVED, now - began)
        if self._done is not None:
            return self._done
        self._skip_passed(now)
        return self._slots[0][0]

    def shorten(self, now: float, remaining: float) -> None:
        """Leave at most `remaining` seconds from now, split among the steps not yet over.

        Call `advance` after it: less time may mean the next step.
        """
        self._running_since()
        end = now + max(remaining, 0.0)
        if self._done is not None or end >= self._end:
            return
        left = {step for step, _ in self._slots}
        self._end = end
        self._slots = _split([share for share in self._shares if share[0] in left], now, end)

    def _skip_passed(self, now: float) -> None:
        while self._slots[0][0] is not Step.KILL and now >= self._slots[0][1]:
            self._slots = self._slots[1:]

    def _running_since(self) -> float:
        if self._began is None:
            raise RuntimeError("the stop has not begun; call begin first")
        return self._began


def _split(
    shares: Sequence[tuple[Step, float]], start: float, end: float
) -> Sequence[tuple[Step, float]]:
    """Each step with the time it ends; the last one ends exactly at `end`."""
    whole = math.fsum(share for _, share in shares)
    slots: list[tuple[Step, float]] = []
    used = 0.0
    for step, share in shares:
        used += share
        slots.append((step, min(end, start + (end - start) * used / whole)))
    slots[-1] = (slots[-1][0], end)
    return slots
