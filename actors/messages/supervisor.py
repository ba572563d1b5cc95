"""The supervisor itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from voidbus.transport.message import Message, Right


class InspectSupervisor(Message, tag="supervisor.inspect", right=Right.OBSERVE):
    """What are you? Ask `supervisor/root`; answered by SupervisorState."""


class SupervisorState(Message, tag="supervisor.state"):
    """The supervisor: who it is, since when, and how busy. `phase`: running or stopping."""

    pid: int
    release: str
    state_dir: str
    started_at: str
    phase: Literal["running", "stopping"]
    active_runs: int
    adopted_runs: int


class StopSupervisor(Message, tag="supervisor.stop", right=Right.OPERATE, changes=True):
    """Stop politely: refuse new work; let runs finish, or cancel them, within `deadline` seconds.

    `runs`: `finish` waits for them and cancels what is left at the deadline, `cancel` cancels
    now, `leave` leaves the run processes running for the next supervisor to adopt.
    Answered by Accepted; the supervisor's process ends when it is done.
    """

    runs: Literal["finish", "cancel", "leave"] = "finish"
    deadline: float = Field(default=30.0, ge=0, le=86400)
