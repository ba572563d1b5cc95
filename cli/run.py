"""`voidbus run`: check a specification, start it, follow it, say what came of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click
from pydantic import ValidationError

from voidbus.actors.messages.runs import (
    CancelAccepted,
    CancelRun,
    InspectRun,
    RunAccepted,
    RunEvent,
    RunState,
    RunStatus,
    StartRun,
)
from voidbus.actors.messages.sidecar import IntentList, ReadIntents
from voidbus.cli.cancel import cancel_deadline
from voidbus.cli.connect import JOURNAL, RUNS, Refusal, Supervisor
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.follow import Follower
from voidbus.cli.given import input_text
from voidbus.cli.messaging import print_intents
from voidbus.cli.options import Place, json_option, state_dir_option
from voidbus.cli.output import (
    STATUS_COLOURS,
    duration,
    paint,
    plain,
    plain_lines,
    print_json,
    say,
    seconds_since,
    warn,
)
from voidbus.cli.own_supervisor import OwnSupervisor, some_supervisor
from voidbus.cli.progress import Progress, progress_for
from voidbus.cli.runs import cost_line
from voidbus.cli.validate import check_file
from voidbus.spec.policy import Policy
from voidbus.transport.fault import FaultReason

# What ends a followed run as Ctrl-C does: being told to end, and the terminal's going away.
_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Journaling a run and answering takes milliseconds; loading what it names may take longer.
_START_TIMEOUT = 30.0


def _policy(
    _context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Any] | None:
    """`--policy name=number`, checked as the supervisor will."""
    policy: dict[str, Any] = {}
    for given in values:
        name, _, value = given.partition("=")
        if name not in Policy.model_fields:
            raise click.BadParameter(f"'{name}' is none of {', '.join(Policy.model_fields)}")
        try:
            policy[name] = int(value)
        except ValueError:
            raise click.BadParameter(f"'{given}': write it as {name}=NUMBER") from None
    try:
        Policy.model_validate(policy)
    except ValidationError as error:
        raise click.BadParameter(error.errors(include_url=False)[0]["msg"]) from None
    return policy or None


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--input", "given", metavar="X|@FILE|-", help="The run's input: text, a file, standard input."
)
@click.option("--run-id", metavar="ID", help="The run's id (default: a new one).")
@click.option(
    "--follow/--detach", default=True, help="Follow it to its end (the default), or only start it."
)
@click.option(
    "--policy", multiple=True, metavar="K=V", callback=_policy, help="May be given repeatedly."
)
@json_option
@state_dir_option
@click.pass_obj
def run(
    place: Place,
    file: Path,
    given: str | None,
    run_id: str | None,
    follow: bool,
    policy: dict[str, Any] | None,
    as_json: bool,
) -> int:
    """Start a run of the specification in FILE and follow it to its end.

    Progress goes to standard error and the result to standard output. Ctrl-C cancels the run
    and waits until it has ended; a second one leaves at once. Where no supervisor runs, one is
    started, and stopped again when the run has ended.
    """
    check_file(file)
    request = StartRun(
        file=str(file.absolute()), input=input_text(given), run_id=run_id, policy=policy
    )
    with some_supervisor(place.state, keep=not follow) as (supervisor, own):
        if follow:
            return _follow(supervisor, request, as_json)
        accepted = _start(supervisor, request)
        _tell_detached(accepted, own, place, as_json)
        return ExitCode.OK


def _start(supervisor: Supervisor, request: StartRun) -> RunAccepted:
    try:
        accepted = supervisor.ask(RUNS, request, RunAccepted, _START_TIMEOUT)
    except Refusal as refusal:
        if refusal.fault.reason is FaultReason.INVALID:
            raise Failure(str(refusal), ExitCode.USAGE) from refusal
        raise
    for warning in accepted.warnings:
        warn(f"warning: {warning}")
    if accepted.existing:
        warn(f"{accepted.run_id} exists already ({accepted.state}); nothing was started")
    return accepted


def _tell_detached(
    accepted: RunAccepted, own: OwnSupervisor | None, place: Place, as_json: bool
) -> None:
    if as_json:
        print_json(accepted)
    else:
        say(plain(accepted.run_id))
    if own is not None:
        warn(
            f"the supervisor (process {own.process.pid}) goes on; stop it with: "
            f"voidbus stop --state-dir {place.state}"
        )


def _follow(supervisor: Supervisor, request: StartRun, as_json: bool) -> int:
    """Start and follow. The first Ctrl-C cancels the run, a second raises KeyboardInterrupt."""
    with _interrupts() as interrupts:
        accepted = _start(supervisor, request)
        with Follower(supervisor, accepted.run_id) as follower:
            interrupts.on_first(follower.wake)
            with progress_for(accepted.run_id, quiet=as_json) as progress:
                _watch(supervisor, follower, progress, interrupts)
        state = supervisor.ask(JOURNAL, InspectRun(run_id=accepted.run_id), RunState)
        sent = _intents(supervisor, accepted.run_id)
    if as_json:
        print_json(
            state.model_dump(mode="json") | {"intents": sent.model_dump(mode="json")["intents"]}
        )
    else:
        _tell_result(state, sent)
    return ExitCode.INTERRUPTED if interrupts.count else exit_code(state)


def _watch(
    supervisor: Supervisor, follower: Follower, progress: Progress, interrupts: _Interrupts
) -> None:
    cancelled = False
    while not follower.ended:
        if interrupts.count and not cancelled:
            cancelled = True
            _cancel(supervisor, follower.run_id, progress)
        event = follower.next(progress.interval)
        if isinstance(event, RunEvent):
            progress.show(event)
        else:
            progress.tick()


def _cancel(supervisor: Supervisor, run_id: str, progress: Progress) -> None:
    state = supervisor.ask(JOURNAL, InspectRun(run_id=run_id), RunState)
    supervisor.ask(
        RUNS, CancelRun(run_id=run_id, reason="interrupted by its operator"), CancelAccepted
    )
    progress.tell(
        f"cancelling {run_id}; this may take {cancel_deadline(state, None):g} s at most. "
        "Ctrl-C again leaves at once"
    )


class _Interrupts:
    """Counts Ctrl-C: the first calls what `on_first` was given, a later one raises."""

    def __init__(self) -> None:
        self.count = 0
        self._call: Callable[[], None] | None = None

    def on_first(self, call: Callable[[], None]) -> None:
        self._call = call

    def take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        if self._call is not None:
            self._call()


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    interrupts = _Interrupts()
    # What is ignored, as by nohup(1) and by a shell's background jobs, stays ignored.
    taken = [number for number in _INTERRUPTS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupts.take) for number in taken}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _intents(supervisor: Supervisor, run_id: str) -> IntentList:
    try:
        return supervisor.ask(RUNS, ReadIntents(run_id=run_id), IntentList)
    except Refusal as refusal:
        warn(f"the run's intents can't be read: {refusal}")
        return IntentList(run_id=run_id, intents=())


def _tell_result(state: RunState, sent: IntentList) -> None:
    status = paint(state.status.value, "bold", STATUS_COLOURS.get(state.status.value, ""))
    took = duration(seconds_since(state.started_at, state.finished_at))
    say(f"{plain(state.id)} {status} in {took}")
    if state.error:
        say(f"error: {plain_lines(state.error)}")
    if state.status is RunStatus.CANCELLED and state.terminal_reason:
        say(f"reason: {plain(state.terminal_reason)}")
    if state.report is not None:
        say(cost_line(state))
        if state.report.output:
            say()
            say(plain_lines(state.report.output.rstrip("\n")))
    if sent.intents:
        say()
        print_intents(sent.intents)


def exit_code(state: RunState) -> ExitCode:
    """What a command that followed a run to its end exits with."""
    if state.status is RunStatus.SUCCEEDED:
        return ExitCode.OK
    return ExitCode.CANCELLED if state.status is RunStatus.CANCELLED else ExitCode.FAILED
