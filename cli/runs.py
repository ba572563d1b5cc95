"""`voidbus ps` and `voidbus inspect`."""

from __future__ import annotations

from typing import Literal

import click

from voidbus.actors.messages.runs import ListRuns, RunList, RunState, RunStatus, run_node
from voidbus.cli.connect import JOURNAL, Refusal, Supervisor, connect
from voidbus.cli.find import find_run
from voidbus.cli.options import Place, json_option, place_options, run_argument
from voidbus.cli.output import (
    STATUS_COLOURS,
    duration,
    note,
    paint,
    plain,
    plain_lines,
    plural,
    print_json,
    print_table,
    say,
    seconds_since,
)

_STATES = ["active", "terminal", *(status.value for status in RunStatus)]


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Also runs that have ended.")
@click.option("--state", type=click.Choice(_STATES), help="Only runs in this state.")
@json_option
@place_options
@click.pass_obj
def ps(place: Place, everything: bool, state: str | None, as_json: bool) -> None:
    """List runs, newest first; those that have not ended, unless told otherwise."""
    group, status = _chosen(everything, state)
    with connect(place.where) as supervisor:
        listed = supervisor.ask(JOURNAL, ListRuns(state=group), RunList)
    if status is not None:
        kept = tuple(run for run in listed.runs if run.status.value == status)
        complete = len(listed.runs) == listed.total
        listed = RunList(runs=kept, total=len(kept) if complete else listed.total)
    if as_json:
        print_json(listed)
        return
    print_table(
        ("RUN", "STATE", "AGE", "TOOK", "NAME", "KIND", "MACHINE", "REASON"),
        [_row(run) for run in listed.runs],
        status=1,
    )
    if not listed.runs and group == "active":
        note("no active runs; voidbus ps --all also lists those that have ended")
    elif listed.total > len(listed.runs):
        note(f"these are the newest {len(listed.runs)} of {listed.total}")


def _chosen(
    everything: bool, state: str | None
) -> tuple[Literal["active", "terminal"] | None, str | None]:
    """What to ask the journal for, and the one status to keep of it."""
    if state is None:
        return (None if everything else "active"), None
    if state == "active":
        return "active", None
    if state == "terminal":
        return "terminal", None
    return ("terminal" if RunStatus(state).terminal else "active"), state


def _row(run: RunState) -> list[str]:
    reason = run.error or run.terminal_reason or ("cancelling" if run.cancelling else "")
    return [
        run.id,
        run.status.value,
        duration(seconds_since(run.started_at)),
        duration(seconds_since(run.started_at, run.finished_at)),
        run.name or "-",
        run.kind or "-",
        (run.machine or "-").partition(" ")[0].rstrip(":,;"),
        reason,
    ]


@click.command()
@run_argument
@json_option
@place_options
@click.pass_obj
def inspect(place: Place, run: str, as_json: bool) -> None:
    """Show one run: its state, stages, machine, result, and its sidecar while it is alive."""
    with connect(place.where) as supervisor:
        state = find_run(supervisor, run)
        sidecar = _sidecar(supervisor, state)
    if as_json:
        print_json(state.model_dump(mode="json") | {"sidecar": sidecar})
        return
    _describe(state)
    if sidecar is not None:
        say(
            f"sidecar      {sidecar['status']}, {sidecar['buffer_depth']} intents buffered, "
            f"inbox version {sidecar['inbox_version']}"
        )
    if state.report is not None and state.report.output:
        say("output")
        say(plain_lines(state.report.output.rstrip("\n")))


def _sidecar(supervisor: Supervisor, state: RunState) -> dict[str, object] | None:
    """The sidecar of a live run; None where it has none or doesn't answer."""
    if state.status.terminal:
        return None
    from voidbus.actors.messages.sidecar import InspectSidecar, SidecarState

    try:
        answer = supervisor.ask(
            f"{run_node(state.id)}/sidecar", InspectSidecar(), SidecarState, timeout=2.0
        )
    except Refusal:
        return None
    return answer.model_dump(mode="json")


def _describe(state: RunState) -> None:
    colour = STATUS_COLOURS.get(state.status.value, "")
    status = paint(state.status.value, colour) + (" (cancelling)" if state.cancelling else "")
    lines = [
        ("run", plain(state.id)),
        ("state", status),
        ("file", plain(state.file)),
        ("name", plain(" ".join(filter(None, (state.name, state.kind, state.mode))))),
        ("machine", plain(state.machine or "")),
        ("started", state.started_at),
        ("finished", state.finished_at or ""),
        ("took", duration(seconds_since(state.started_at, state.finished_at))),
        ("reason", plain(state.terminal_reason or "")),
        ("error", plain_lines(state.error or "")),
        ("exit code", "" if state.exit_code is None else str(state.exit_code)),
        ("process", str(state.run_process or "")),
        ("generation", str(state.generation)),
        ("attempt", str(state.attempt_id)),
        ("events", str(state.last_seq + 1)),
        ("policy", plain(", ".join(f"{k}={v}" for k, v in (state.policy or {}).items()))),
    ]
    if not state.status.terminal:
        active = (
            f"{plural(state.active_stage_count, 'stage')}, "
            f"{plural(state.active_microvm_count, 'machine')}"
        )
        lines.append(("active", active))
    if state.report is not None:
        lines.append(("cost", cost_line(state)))
    for title, text in lines:
        if text:
            say(f"{title:<12} {text}")
    for stage, progress in (state.stage_states or {}).items():
        took = duration(seconds_since(progress.started_at, progress.completed_at))
        shown = paint(progress.status.ljust(9), STATUS_COLOURS.get(progress.status, ""))
        say(f"{'stage':<12} {shown} {took:>7}  {plain(stage)}")


def cost_line(state: RunState) -> str:
    """Tokens and cost of a run that has a report."""
    report = state.report
    if report is None:
        return ""
    return (
        f"{report.input_tokens} tokens in, {report.output_tokens} tokens out, "
        f"${report.total_cost_usd:.4f}"
    )
