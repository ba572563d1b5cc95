"""Options and arguments that many commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from voidbus.cli.state import state_directory

F = TypeVar("F", bound=Callable[..., Any])


class Place:
    """Which supervisor a command means: the state directory as given, and as found."""

    def __init__(self, given: Path | None) -> None:
        self.given = given

    @property
    def state(self) -> Path:
        """The state directory, absolute."""
        return state_directory(self.given)


def _take_state_dir(
    context: click.Context, _parameter: click.Parameter, value: Path | None
) -> Path | None:
    if value is not None:
        # The command's own option wins over the group's.
        context.obj = Place(value)
    elif context.obj is None:
        context.obj = Place(None)
    return value


def state_dir_option(function: F) -> F:
    """`--state-dir`, accepted after a command's name as well as before it."""
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        expose_value=False,
        is_eager=True,
        callback=_take_state_dir,
        help="The supervisor's state directory.",
    )(function)


def json_option(function: F) -> F:
    """`--json`: the parameter `as_json`."""
    return click.option(
        "--json", "as_json", is_flag=True, help="Print JSON, with the fields of docs/cli.md."
    )(function)


def run_argument(function: F) -> F:
    """`RUN`: a run's id or the beginning of it. Completed from the runs there are."""
    return click.argument("run", metavar="RUN", shell_complete=_complete_run)(function)


def runs_argument(function: F) -> F:
    """`RUN...`: one run or more."""
    return click.argument(
        "runs", metavar="RUN...", nargs=-1, required=True, shell_complete=_complete_run
    )(function)


def _complete_run(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Ids of runs; none, and no words, where there is nobody to ask."""
    from voidbus.cli.connect import connect
    from voidbus.cli.failure import Failure
    from voidbus.cli.find import list_runs

    place = context.obj or (context.find_root().obj or Place(None))
    try:
        with connect(place.state, link_timeout=1.0) as supervisor:
            found = list_runs(supervisor, timeout=1.0)
    except Failure:
        return []
    return [
        CompletionItem(state.id, help=f"{state.status} {state.name}")
        for state in found.runs
        if state.id.startswith(incomplete)
    ]
