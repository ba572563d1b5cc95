"""`voidbus stop`: end the supervisor, and see that it is gone."""

from __future__ import annotations

import os
import select
import time
from typing import Literal

import click

from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.runs import EventPublished, ListRuns, RunList
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.cli.connect import JOURNAL, ROOT, Refusal, Supervisor, connect
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.follow import ENDINGS
from voidbus.cli.options import Place, json_option, state_dir_option
from voidbus.cli.output import plain, plural, print_json, say, warn
from voidbus.cli.state import SupervisorRecord
from voidbus.transport.fault import FaultReason
from voidbus.transport.topics import Publication

# What a stop takes beyond the time the runs get: cancelling what is left, and ending the
# supervisor's own actors, each with deadlines of their own (seconds).
_BEYOND = 30.0


class Endings:
    """How runs end while the supervisor stops, as their events tell."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def take(self, publication: Publication) -> None:
        message = publication.message
        if isinstance(message, EventPublished) and message.event.event_type in ENDINGS:
            kind = message.event.event_type.removeprefix("run.")
            self.seen[message.event.run_id] = kind


@click.command()
@click.option(
    "--runs",
    type=click.Choice(["finish", "cancel", "leave"]),
    default="finish",
    show_default=True,
    help="Let runs finish, cancel them, or leave them for the next supervisor.",
)
@click.option(
    "--deadline",
    type=click.FloatRange(0, 86400),
    default=30.0,
    show_default=True,
    metavar="S",
    help="How long runs may take to finish before they are cancelled.",
)
@json_option
@state_dir_option
@click.pass_obj
def stop(
    place: Place, runs: Literal["finish", "cancel", "leave"], deadline: float, as_json: bool
) -> None:
    """Stop the supervisor and wait until its process is gone.

    With Ctrl-C only the waiting ends: the supervisor goes on stopping.
    """
    with connect(place.state, "operate") as supervisor:
        record = supervisor.record
        pidfd = _open_process(record)
        try:
            endings = Endings()
            supervisor.leaf.subscribe("events/", endings.take).wait_ready(2.0)
            active = _active(supervisor)
            began = time.monotonic()
            if pidfd >= 0:
                _ask_to_stop(supervisor, runs, deadline)
                if active and not as_json:
                    _tell_wait(runs, len(active), deadline)
                _wait_gone(pidfd, record, deadline)
        finally:
            if pidfd >= 0:
                os.close(pidfd)
    took = time.monotonic() - began
    outcome = {run_id: endings.seen.get(run_id, "left") for run_id in active}
    if as_json:
        print_json({"pid": record.pid, "stopped": True, "seconds": round(took, 3), "runs": outcome})
        return
    say(f"supervisor (process {record.pid}) stopped in {took:.1f} s")
    for run_id, ending in outcome.items():
        left = "goes on; the next supervisor adopts it" if ending == "left" else ending
        say(f"{plain(run_id)} {left}")


def _open_process(record: SupervisorRecord) -> int:
    """A descriptor of the supervisor's process; -1 where it has ended."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return -1
    # Opened first and looked at then: a recycled pid would have another start time.
    if record.alive:
        return pidfd
    os.close(pidfd)
    return -1


def _active(supervisor: Supervisor) -> list[str]:
    """The ids of the runs that go on; none where the journal can't say, which must not keep
    anybody from stopping."""
    try:
        listed = supervisor.ask(JOURNAL, ListRuns(state="active"), RunList, 3.0)
    except Refusal as refusal:
        warn(f"which runs are active is not known: {refusal}")
        return []
    return [run.id for run in listed.runs]


def _ask_to_stop(
    supervisor: Supervisor, runs: Literal["finish", "cancel", "leave"], deadline: float
) -> None:
    try:
        supervisor.ask(ROOT, StopSupervisor(runs=runs, deadline=deadline), Accepted)
    except Refusal as refusal:
        # It may go before its answer can be read; whether it does is waited for anyway.
        if refusal.fault.reason is not FaultReason.LINK_LOST:
            raise


def _tell_wait(runs: str, active: int, deadline: float) -> None:
    count = plural(active, "run")
    if runs == "finish":
        warn(f"waiting up to {deadline:g} s for {count} to finish (--runs cancel does not wait)")
    elif runs == "cancel":
        warn(f"cancelling {count}")


def _wait_gone(pidfd: int, record: SupervisorRecord, deadline: float) -> None:
    """Wait until the process has ended. Raises Failure (124) where it doesn't."""
    allowed = deadline + _BEYOND
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)  # readable when the process has ended: pidfd_open(2)
    if not poll.poll(allowed * 1000):
        raise Failure(
            f"the supervisor (process {record.pid}) was told to stop but still runs after "
            f"{allowed:g} s. See voidbus actors; to end it now, leaving its runs to the next "
            f"one: kill -KILL {record.pid}",
            ExitCode.TIMED_OUT,
        )
