"""`voidbus actors`: every actor of the supervisor and of the runs, and how it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import click

from voidbus.actors.messages.actor import ActorStatus, InspectSystem, SystemStatus
from voidbus.actors.messages.runs import ListRuns, RunList, run_node
from voidbus.cli.connect import JOURNAL, SYSTEM, Refusal, Supervisor, connect
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.options import Place, json_option, place_options
from voidbus.cli.output import duration, paint, plain, print_json, print_table, say
from voidbus.transport.delivery import Ask

# A system answers on its node's own thread, so it answers at once or not at all (seconds).
_TIMEOUT = 3.0


@dataclass
class _Census:
    """The systems that answered, and why others did not."""

    systems: list[SystemStatus] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)


@click.command()
@json_option
@place_options
@click.pass_obj
def actors(place: Place, as_json: bool) -> int:
    """Show every actor: its age, what waits for it, its restarts and its last fault.

    Exits with 1 where an actor is stuck or a run's process does not answer.
    """
    with connect(place.where) as supervisor:
        census = _ask_all(supervisor)
    if as_json:
        print_json(_document(census))
    else:
        _print(census)
    stuck = any(actor.state == "stuck" for system in census.systems for actor in system.actors)
    return ExitCode.FAILED if stuck or census.unreachable else ExitCode.OK


def _ask_all(supervisor: Supervisor) -> _Census:
    """Ask the supervisor's system and, all at once, those of the active runs."""
    census = _Census([supervisor.ask(SYSTEM, InspectSystem(), SystemStatus, _TIMEOUT)])
    try:
        active = supervisor.ask(JOURNAL, ListRuns(state="active"), RunList, _TIMEOUT)
    except Refusal as refusal:
        census.unreachable["runs"] = f"the journal did not say which there are: {refusal}"
        return census
    asks: dict[str, Ask] = {}
    for run in active.runs:
        node = run_node(run.id)
        asks[node] = supervisor.begin(f"{node}/system", InspectSystem(), _TIMEOUT)
    for node, ask in asks.items():
        try:
            census.systems.append(supervisor.finish(ask, SystemStatus))
        except Failure as failure:
            census.unreachable[node] = str(failure)
    return census


def _document(census: _Census) -> dict[str, Any]:
    return {
        "systems": [system.model_dump(mode="json") for system in census.systems],
        "unreachable": census.unreachable,
    }


def _print(census: _Census) -> None:
    rows: list[list[str]] = []
    for system in census.systems:
        rows.append([f"{system.node} (process {system.pid}, {system.threads} threads)"])
        rows.extend(_rows(system.actors))
    print_table(
        ("ACTOR", "STATE", "AGE", "WAITING", "OLDEST", "HANDLED", "RESTARTS", "LAST FAULT"), rows
    )
    for node, why in census.unreachable.items():
        say(paint(f"{node}: no answer: {plain(why)}", "red"))


def _rows(found: tuple[ActorStatus, ...]) -> list[list[str]]:
    """Actors as a tree: `run/vm` is below `run`. A parent that is not there is named anyway."""
    names: dict[str, ActorStatus | None] = {actor.path: actor for actor in found}
    for path in list(names):
        parent = path.rpartition("/")[0]
        while parent and parent not in names:
            names[parent] = None
            parent = parent.rpartition("/")[0]
    ordered = sorted(names, key=lambda path: path.split("/"))
    rows = []
    for position, path in enumerate(ordered):
        actor = names[path]
        label = _label(path, ordered[position + 1 :])
        if actor is None:
            rows.append([label, "", "", "", "", "", "", ""])
            continue
        rows.append(
            [
                label,
                _state(actor),
                duration(actor.age),
                f"{actor.depth + actor.control_depth}/{actor.limit}",
                duration(actor.head_age) if actor.head_age else "-",
                str(actor.handled),
                str(actor.restarts),
                actor.last_fault or "-",
            ]
        )
    return rows


def _state(actor: ActorStatus) -> str:
    if actor.state != "stuck":
        return actor.state
    return f"stuck for {duration(actor.stuck_for)} in {actor.handler}"


def _label(path: str, following: list[str]) -> str:
    """The last part of a path behind the lines of its tree."""
    parts = path.split("/")
    label = ""
    for depth in range(len(parts)):
        siblings = "/".join(parts[:depth])
        prefix = f"{siblings}/" if siblings else ""
        here = f"{prefix}{parts[depth]}"
        more = any(
            other.startswith(prefix) and other != here and not other.startswith(f"{here}/")
            for other in following
        )
        if depth == len(parts) - 1:
            label += "├─ " if more else "└─ "
        else:
            label += "│  " if more else "   "
    return label + parts[-1]
