"""`voidbus doctor`: what this host can do, and the exact remedy for what it can't."""

from __future__ import annotations

import click

from voidbus.cli.checks import Check, examine
from voidbus.cli.failure import ExitCode
from voidbus.cli.options import Place, json_option, state_dir_option
from voidbus.cli.output import paint, plain, print_json, say

_MARKS = {"ok": ("ok", "green"), "note": ("note", "cyan"), "problem": ("PROBLEM", "red")}


@click.command()
@json_option
@state_dir_option
@click.pass_obj
def doctor(place: Place, as_json: bool) -> int:
    """Check this host: kernel, Python, ZeroMQ, state directory, disk, supervisor, machines.

    Needs no supervisor. Exits with 1 where there is a problem.
    """
    checks = examine(place.state)
    sound = all(check.status != "problem" for check in checks)
    if as_json:
        print_json({"ok": sound, "checks": [check.document() for check in checks]})
    else:
        for check in checks:
            _print(check)
    return ExitCode.OK if sound else ExitCode.FAILED


def _print(check: Check) -> None:
    word, colour = _MARKS[check.status]
    say(f"{paint(word.ljust(7), colour)} {check.name:<16} {plain(check.detail)}")
    if check.remedy:
        say(f"{'':24} remedy: {plain(check.remedy)}")
