"""`voidbus events` and `voidbus logs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import click

from voidbus.actors.messages.runs import EventPage, ReadEvents, RunEvent
from voidbus.cli.connect import JOURNAL, Supervisor, connect
from voidbus.cli.event_line import event_line, log_text
from voidbus.cli.find import find_run
from voidbus.cli.follow import Follower
from voidbus.cli.options import Place, json_option, place_options, run_argument
from voidbus.cli.output import plain, print_json, print_json_line, say, say_now


@click.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option(
    "--since",
    type=click.IntRange(min=-1),
    default=-1,
    metavar="SEQ",
    help="Only events after this number (they begin at 0).",
)
@json_option
@place_options
@click.pass_obj
def events(place: Place, run: str, follow: bool, since: int, as_json: bool) -> None:
    """Show a run's events.

    With --follow they are printed as they come, until the run has ended; --json then prints one
    document on a line for each.
    """
    _show(place, run, follow, since, as_json, lambda _: True, event_line)


@click.command()
@run_argument
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option(
    "--stream", type=click.Choice(["stdout", "stderr"]), help="Only what was printed there."
)
@click.option("--stage", metavar="STAGE", help="Only what this stage printed.")
@json_option
@place_options
@click.pass_obj
def logs(
    place: Place, run: str, follow: bool, stream: str | None, stage: str | None, as_json: bool
) -> None:
    """Show what a run's programs print, line by line.

    Control characters are shown as \\x1b and the like, so that no program in a guest can act on
    this terminal; --json has the lines as they are.
    """

    def wanted(event: RunEvent) -> bool:
        return (
            log_text(event) is not None
            and stream in (None, event.stream)
            and stage in (None, event.stage_name)
        )

    _show(place, run, follow, -1, as_json, wanted, lambda event: plain(log_text(event) or ""))


def _show(
    place: Place,
    run: str,
    follow: bool,
    since: int,
    as_json: bool,
    wanted: Callable[[RunEvent], bool],
    line: Callable[[RunEvent], str],
) -> None:
    with connect(place.where) as supervisor:
        run_id = find_run(supervisor, run).id
        if follow:
            for event in _followed(supervisor, run_id, since):
                if not wanted(event):
                    continue
                if as_json:
                    print_json_line(event)
                else:
                    say_now(line(event))
            return
        document: dict[str, object] = {"run_id": run_id, "events": [], "last_seq": -1}
        chosen: list[object] = []
        for page in _pages(supervisor, run_id, since):
            for event in filter(wanted, page.events):
                if as_json:
                    chosen.append(event.model_dump(mode="json"))
                else:
                    say(line(event))
            document |= {"last_seq": page.last_seq, "ended": page.ended}
        if as_json:
            print_json(document | {"events": chosen})


def _followed(supervisor: Supervisor, run_id: str, since: int) -> Iterator[RunEvent]:
    with Follower(supervisor, run_id, since) as follower:
        while not follower.ended:
            event = follower.next(1.0)
            if isinstance(event, RunEvent):
                yield event


def _pages(supervisor: Supervisor, run_id: str, since: int) -> Iterator[EventPage]:
    """The journal's pages up to what is the newest event now."""
    newest: int | None = None
    while True:
        page = supervisor.ask(JOURNAL, ReadEvents(run_id=run_id, after=since), EventPage)
        yield page
        newest = page.last_seq if newest is None else newest
        if not page.events or page.events[-1].seq >= newest:
            return
        since = page.events[-1].seq
