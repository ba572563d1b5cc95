"""Which run an operator means."""

from __future__ import annotations

from voidbus.actors.messages.runs import InspectRun, ListRuns, RunList, RunState
from voidbus.cli.connect import ASK_TIMEOUT, JOURNAL, Refusal, Supervisor
from voidbus.cli.failure import ExitCode, Failure
from voidbus.transport.fault import FaultReason

# The candidates an error names before it only counts.
_NAMED = 8


def list_runs(supervisor: Supervisor, timeout: float = ASK_TIMEOUT) -> RunList:
    """The newest thousand runs, newest first."""
    return supervisor.ask(JOURNAL, ListRuns(), RunList, timeout)


def find_run(supervisor: Supervisor, text: str) -> RunState:
    """The run whose id is `text`, or the only one whose id begins with it.

    Raises Failure: no such run (4), or several (2), naming them.
    """
    try:
        return supervisor.ask(JOURNAL, InspectRun(run_id=text), RunState)
    except Refusal as refusal:
        if refusal.fault.reason not in (FaultReason.NO_SUCH_ACTOR, FaultReason.INVALID):
            raise
    listed = list_runs(supervisor)
    matches = [state for state in listed.runs if text and state.id.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        names = ", ".join(f"{state.id} ({state.status})" for state in matches[:_NAMED])
        more = f" and {len(matches) - _NAMED} more" if len(matches) > _NAMED else ""
        raise Failure(
            f"'{text}' may be any of {len(matches)} runs: {names}{more}. Give more of the id",
            ExitCode.USAGE,
        )
    searched = ""
    if listed.total > len(listed.runs):
        searched = f" (abbreviations find the newest {len(listed.runs)} of {listed.total} only)"
    raise Failure(
        f"there is no run '{text}'{searched}. List them: voidbus ps --all", ExitCode.NO_SUCH_RUN
    )
