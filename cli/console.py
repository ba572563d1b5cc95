"""`voidbus console`: what a run's machine wrote to its serial console."""

from __future__ import annotations

import click

from voidbus.actors.messages.runs import ConsoleText, ReadConsole
from voidbus.cli.connect import RUNS, connect
from voidbus.cli.find import find_run
from voidbus.cli.options import Place, json_option, run_argument, state_dir_option
from voidbus.cli.output import note, plain, print_json, say


@click.command()
@run_argument
@json_option
@state_dir_option
@click.pass_obj
def console(place: Place, run: str, as_json: bool) -> None:
    """Show the end of what a run's machine wrote to its console: kernel and guest agent.

    Up to 64 KiB, also after the run has ended. Control characters are shown as \\x1b and the
    like; --json has the text as it is.
    """
    with connect(place.state) as supervisor:
        run_id = find_run(supervisor, run).id
        text = supervisor.ask(RUNS, ReadConsole(run_id=run_id), ConsoleText).text
    if as_json:
        print_json({"run_id": run_id, "console": text})
        return
    for line in text.splitlines():
        say(plain(line))
    if not text:
        note("the console is empty")
