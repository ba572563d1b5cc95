"""`voidbus prune`: forget runs that have ended, with their events and files."""

from __future__ import annotations

import re

import click

from voidbus.actors.messages.archive import ArchivePruned, PruneArchive
from voidbus.cli.artifacts import ARCHIVE
from voidbus.cli.connect import connect
from voidbus.cli.options import Place, json_option, place_options
from voidbus.cli.output import plain, plural, print_json, say, size

# A prune goes a few runs at a time, and looks through all files afterwards.
PRUNE_TIMEOUT = 600.0

_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d|w)\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)(?:i?B)?\Z", re.IGNORECASE)
_BYTES = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def _span(_context: click.Context, _parameter: click.Parameter, text: str | None) -> float | None:
    """Seconds."""
    if text is None:
        return None
    match = _SPAN.match(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no length of time; write 30m, 12h, 7d or 4w")
    return float(match[1]) * _SECONDS[match[2]]


def _amount(_context: click.Context, _parameter: click.Parameter, text: str | None) -> int | None:
    """Bytes."""
    if text is None:
        return None
    match = _AMOUNT.match(text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no amount; write 500M or 10G")
    return int(float(match[1]) * _BYTES[match[2].upper()])


@click.command()
@click.option(
    "--older-than", callback=_span, metavar="TIME", help="Those that ended longer ago: 12h, 7d, 4w."
)
@click.option(
    "--max-size",
    callback=_amount,
    metavar="SIZE",
    help="The oldest, until all that have ended take up no more: 500M, 10G.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be forgotten, and forget nothing.")
@json_option
@place_options
@click.pass_obj
def prune(
    place: Place,
    older_than: float | None,
    max_size: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Forget runs that have ended: their events, their files, their consoles.

    Runs that go on are never touched. What a supervisor keeps by itself is in its configuration,
    under retention.
    """
    if older_than is None and max_size is None:
        raise click.UsageError("say what is to go: --older-than TIME, --max-size SIZE, or both")
    message = PruneArchive(older_than=older_than, max_bytes=max_size, dry_run=dry_run)
    with connect(place.where, "operate") as supervisor:
        pruned = supervisor.ask(ARCHIVE, message, ArchivePruned, timeout=PRUNE_TIMEOUT)
    if as_json:
        print_json(pruned.model_dump(mode="json") | {"dry_run": dry_run})
        return
    done = "would forget" if dry_run else "forgot"
    say(f"{done} {plural(pruned.count, 'run')} of {size(pruned.size_bytes)}")
    if dry_run:
        for run_id in pruned.runs:
            say(plain(run_id))
    elif pruned.freed_bytes:
        say(f"{size(pruned.freed_bytes)} of files that nobody lists any more are gone")
