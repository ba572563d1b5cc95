"""`voidbus cancel`."""

from __future__ import annotations

import time

import click

from voidbus.actors.messages.runs import CancelAccepted, CancelRun, InspectRun, RunState
from voidbus.cli.connect import JOURNAL, RUNS, Supervisor, connect
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.find import find_run
from voidbus.cli.follow import Follower
from voidbus.cli.options import Place, json_option, place_options, runs_argument
from voidbus.cli.output import plain, print_json, say

# The grace a run has where its policy names none, as the HTTP API documents it (seconds).
DEFAULT_GRACE = 30.0
# What a cancel takes beyond the grace at most: the stop ladder of the machine and of the run's
# process, each step of which has a deadline of its own (seconds).
BEYOND_GRACE = 60.0


@click.command()
@runs_argument
@click.option("--reason", metavar="TEXT", help="Why; kept with the run.")
@click.option(
    "--grace",
    type=click.FloatRange(0, 3600),
    metavar="SECONDS",
    help="How long the agent may take to end by itself (default: the run's policy).",
)
@click.option("--no-wait", is_flag=True, help="Return when the cancel is accepted.")
@json_option
@place_options
@click.pass_obj
def cancel(
    place: Place,
    runs: tuple[str, ...],
    reason: str | None,
    grace: float | None,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Cancel runs and wait until they have ended: agents told, machines gone.

    A run that has ended already stays as it is, and is no error.
    """
    with connect(place.where, "operate") as supervisor:
        # All are found before any is cancelled: a wrong id cancels nothing.
        found = {state.id: state for state in (find_run(supervisor, run) for run in runs)}
        accepted = [
            supervisor.ask(
                RUNS, CancelRun(run_id=run_id, reason=reason, grace=grace), CancelAccepted
            )
            for run_id in found
        ]
        if no_wait:
            _tell_accepted(accepted, as_json)
            return
        ended = []
        for answer in accepted:
            already = answer.terminal_event_id is not None or answer.state.terminal
            if not already:
                wait_for_end(supervisor, found[answer.run_id], grace)
            state = supervisor.ask(JOURNAL, InspectRun(run_id=answer.run_id), RunState)
            ended.append(state)
            if not as_json:
                had = "had ended already: " if already else ""
                say(f"{plain(state.id)} {had}{state.status}")
        if as_json:
            documents = [
                CancelAccepted(
                    run_id=state.id, state=state.status, terminal_event_id=state.terminal_event_id
                ).model_dump(mode="json")
                for state in ended
            ]
            print_json({"runs": documents})


def _tell_accepted(accepted: list[CancelAccepted], as_json: bool) -> None:
    if as_json:
        print_json({"runs": [answer.model_dump(mode="json") for answer in accepted]})
        return
    for answer in accepted:
        done = answer.terminal_event_id is not None or answer.state.terminal
        say(f"{plain(answer.run_id)} " + (f"had ended: {answer.state}" if done else "cancelling"))


def cancel_deadline(state: RunState, grace: float | None) -> float:
    """How long a cancel of this run may take, in seconds."""
    if grace is None:
        grace = float((state.policy or {}).get("cancel_grace_period_secs", DEFAULT_GRACE))
    return grace + BEYOND_GRACE


def wait_for_end(supervisor: Supervisor, state: RunState, grace: float | None) -> None:
    """Wait for a cancelled run's last event. Raises Failure (124) where it doesn't come."""
    allowed = cancel_deadline(state, grace)
    deadline = time.monotonic() + allowed
    with Follower(supervisor, state.id, state.last_seq) as follower:
        while not follower.ended:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Failure(
                    f"{state.id} was told to end but has not within {allowed:g} s. See what it is "
                    f"doing: voidbus actors; voidbus events {state.id}",
                    ExitCode.TIMED_OUT,
                )
            follower.next(min(left, 1.0))
