"""Options and arguments that many commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.state import Remote, default_client_keys, state_directory

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Place:
    """Which supervisor a command means: by its state directory, or by its address elsewhere."""

    given: Path | None = None
    url: str | None = None
    keys: Path | None = None

    @property
    def state(self) -> Path:
        """The state directory, absolute. Raises Failure where another machine is meant."""
        if self.url is not None:
            raise Failure(
                f"this command works on the supervisor's own host only, not with --connect "
                f"{self.url}",
                ExitCode.USAGE,
            )
        return state_directory(self.given)

    @property
    def where(self) -> Path | Remote:
        """The state directory, or the supervisor on another machine."""
        if self.url is None:
            return self.state
        return Remote(self.url, self.keys or default_client_keys())


def _taker(field: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Put an option's value into the Place; the command's own wins over the group's."""

    def take(context: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        place = context.obj or Place()
        context.obj = place if value is None else replace(place, **{field: value})
        return value

    return take


def state_dir_option(function: F) -> F:
    """`--state-dir`, accepted after a command's name as well as before it."""
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        expose_value=False,
        is_eager=True,
        callback=_taker("given"),
        help="The supervisor's state directory.",
    )(function)


def place_options(function: F) -> F:
    """`--state-dir`, or `--connect` and `--keys` for a supervisor on another machine."""
    for flag, field, metavar, kind, text in (
        (
            "--keys",
            "keys",
            "FILE",
            click.Path(path_type=Path, dir_okay=False),
            "This client's keys.",
        ),
        ("--connect", "url", "tcp://HOST:PORT", str, "A supervisor on another machine."),
    ):
        function = click.option(
            flag,
            field,
            type=kind,
            metavar=metavar,
            expose_value=False,
            is_eager=True,
            callback=_taker(field),
            help=text,
        )(function)
    return state_dir_option(function)


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
    from voidbus.cli.find import list_runs

    place = context.obj or (context.find_root().obj or Place())
    try:
        with connect(place.where, link_timeout=1.0) as supervisor:
            found = list_runs(supervisor, timeout=1.0)
    except Failure:
        return []
    return [
        CompletionItem(state.id, help=f"{state.status} {state.name}")
        for state in found.runs
        if state.id.startswith(incomplete)
    ]
