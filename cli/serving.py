"""`voidbus serve`: the command; what it does is in `serve.py`."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import click

from voidbus.cli.interrupts import importing
from voidbus.cli.options import Place, state_dir_option

# What the owner of an ephemeral supervisor writes to let it go on without it.
KEEP = b"k"


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
@click.option(
    "--listen",
    metavar="ADDRESS",
    help="Where the HTTP API listens: unix:///PATH, tcp://IP:PORT, or off (default: as "
    "configured, else voidbox.sock where clients look for it).",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="The bearer token of the HTTP API on TCP, in a file only you can read.",
)
# How `voidbus run` starts one for itself: it ends when whoever holds its standard input does.
@click.option("--ephemeral", is_flag=True, hidden=True)
@state_dir_option
@click.pass_obj
def serve(
    place: Place,
    config: Path | None,
    log_level: str | None,
    listen: str | None,
    token_file: Path | None,
    ephemeral: bool,
) -> int:
    """Run the supervisor in the foreground, until it is stopped.

    SIGTERM or Ctrl-C stops it politely; a second one cancels the runs there are.
    """
    with importing():
        from voidbus.cli.serve import serve as serve_until_stopped

    if ephemeral:
        threading.Thread(target=_end_with_owner, name="owner-watch", daemon=True).start()
    given = place.given if place.url is None else place.state  # which says why not
    flags = {
        "state_dir": str(given.absolute()) if given is not None else None,
        "log.level": log_level,
        # One that ends with a command is nobody's to find.
        "api.listen": "off" if ephemeral else listen,
        "api.token_file": str(token_file.absolute()) if token_file is not None else None,
    }
    return serve_until_stopped(config, os.environ, flags)


def _end_with_owner() -> None:
    """Stop politely when standard input ends, for then its owner has, unless it said KEEP."""
    if os.read(0, 1) != KEEP:
        os.kill(os.getpid(), signal.SIGTERM)
