"""What a run process is given at its start, and what the supervisor says to it."""

from __future__ import annotations

import logging

from pydantic import BaseModel, ConfigDict, Field

from voidbus.spec.machines import MachinesConfig
from voidbus.transport.message import Message, Right


class RunConfig(BaseModel):
    """Everything a run process needs; handed over in memory, for it holds secrets.

    `spec` is the run specification as JSON, `hub` the URL of the work endpoint, `directory` the
    run's own on the host, `artifacts` the folder of files that are kept, `log_level` what of
    voidbus is logged (a level of `logging`).
    """

    model_config = ConfigDict(frozen=True)

    run_id: str
    generation: int
    token: str = Field(repr=False)
    hub: str
    directory: str
    artifacts: str
    spec: str = Field(repr=False)
    spec_name: str
    input: str | None = Field(default=None, repr=False)
    policy: dict[str, int] | None = None
    next_seq: int
    machines: MachinesConfig = MachinesConfig()
    log_level: int = logging.INFO


class CancelWork(Message, tag="run.cancel", right=Right.OPERATE):
    """To `run-<id>/run`: end the run. Answered by Accepted; its outcome is journaled."""

    reason: str
    grace: float | None = None
