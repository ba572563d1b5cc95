"""A run that has not ended, as its supervisor sees it."""

from __future__ import annotations

from dataclasses import dataclass

from voidbus.actors.messages.runs import RunState
from voidbus.actors.runtime.actor import Timer
from voidbus.actors.runtime.process import ProcessIdentity
from voidbus.actors.runtime.process_child import ProcessChild

DEFAULT_GRACE = 30.0


@dataclass
class RunRecord:
    """`ended`: its outcome is journaled. `exited`: its process is gone, or never came to be.

    A run is over when it is both.
    """

    run_id: str
    generation: int
    child: ProcessChild
    grace: float
    identity: ProcessIdentity | None = None
    exited: bool = False
    ended: bool = False
    cancel_reason: str | None = None
    cancel_grace: float = DEFAULT_GRACE
    cancel_sent: bool = False
    adoption: Timer | None = None

    @property
    def over(self) -> bool:
        return self.ended and self.exited


def grace_of(state: RunState) -> float:
    """The grace a cancelled run's agent is given, in seconds: its policy's, or 30."""
    value = (state.policy or {}).get("cancel_grace_period_secs", DEFAULT_GRACE)
    return float(value) if isinstance(value, int | float) else DEFAULT_GRACE
