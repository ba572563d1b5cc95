"""`voidbus serve`: the command; what it does is in `serve.py`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from voidbus.cli.options import Place, state_dir_option


@click.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The supervisor's configuration (default: $XDG_CONFIG_HOME/voidbus/supervisor.yaml).",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="What is logged to standard error (default: as configured, else info).",
)
# Tells, in a process list, the supervisor that `voidbus run` started for itself from one that an
# operator did.
@click.option("--ephemeral", is_flag=True, hidden=True, expose_value=False)
@state_dir_option
@click.pass_obj
def serve(place: Place, config: Path | None, log_level: str | None) -> int:
    """Run the supervisor in the foreground, until it is stopped.

    SIGTERM or Ctrl-C stops it politely; a second one cancels the runs there are.
    """
    from voidbus.cli.serve import serve as serve_until_stopped

    given = place.given
    flags = {
        "state_dir": str(given.absolute()) if given is not None else None,
        "log.level": log_level,
    }
    return serve_until_stopped(config, os.environ, flags)
