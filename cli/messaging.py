"""`voidbus inbox`, `voidbus message` and `voidbus intents`: talking with a run's agent."""

from __future__ import annotations

import json
import secrets
from typing import Any

import click
from pydantic import ValidationError

from voidbus.actors.messages.sidecar import (
    IntentList,
    PushMessage,
    PutInbox,
    ReadIntents,
    SidecarState,
)
from voidbus.cli.connect import RUNS, connect
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.find import find_run
from voidbus.cli.given import read_text
from voidbus.cli.options import Place, json_option, place_options, run_argument
from voidbus.cli.output import note, plain, print_json, print_table, say
from voidbus.sidecar.model import InboxEntry, InboxSnapshot, Intent


@click.group()
def inbox() -> None:
    """Replace a run's inbox."""


@inbox.command("put")
@run_argument
@click.argument("file", metavar="FILE|-")
@json_option
@place_options
@click.pass_obj
def put(place: Place, run: str, file: str, as_json: bool) -> None:
    """Replace a run's whole inbox by the JSON in FILE, or on standard input where it is `-`.

    The JSON has `execution_id`, `candidate_id`, `iteration`, `entries`, and a `version` unless
    the next one is meant; an entry has `message_id`, `from_candidate_id`, `kind`, `payload`.
    """
    text = read_text(file)
    try:
        snapshot = InboxSnapshot.model_validate_json(text)
    except ValidationError as error:
        raise Failure(f"{file} is no inbox: {_fields(error)}", ExitCode.USAGE) from error
    with connect(place.where, "operate") as supervisor:
        run_id = find_run(supervisor, run).id
        state = supervisor.ask(RUNS, PutInbox(run_id=run_id, inbox=snapshot), SidecarState)
    _tell(state, as_json)


@click.command()
@run_argument
@click.option("--kind", required=True, metavar="KIND", help="What it is, for example: signal.")
@click.option("--from", "sender", default="operator", metavar="NAME", help="Who it is from.")
@click.option("--payload", metavar="JSON", help="What it says, as JSON.")
@click.option("--summary", metavar="TEXT", help='What it says: {"summary_text": TEXT}.')
@click.option("--id", "message_id", metavar="ID", help="Its id (default: a new one).")
@json_option
@place_options
@click.pass_obj
def message(
    place: Place,
    run: str,
    kind: str,
    sender: str,
    payload: str | None,
    summary: str | None,
    message_id: str | None,
    as_json: bool,
) -> None:
    """Add one message to a run's inbox."""
    entry = InboxEntry(
        message_id=message_id or f"msg-{secrets.token_hex(8)}",
        from_candidate_id=sender,
        kind=kind,
        payload=_payload(payload, summary),
    )
    with connect(place.where, "operate") as supervisor:
        run_id = find_run(supervisor, run).id
        state = supervisor.ask(RUNS, PushMessage(run_id=run_id, entry=entry), SidecarState)
    _tell(state, as_json)


@click.command()
@run_argument
@click.option("--drain", is_flag=True, help="Take them away: nobody else will get them.")
@json_option
@place_options
@click.pass_obj
def intents(place: Place, run: str, drain: bool, as_json: bool) -> None:
    """Show the intents a run's agent has sent, also after its end."""
    with connect(place.where, "operate") as supervisor:
        run_id = find_run(supervisor, run).id
        answer = supervisor.ask(RUNS, ReadIntents(run_id=run_id, drain=drain), IntentList)
    if as_json:
        print_json(answer)
    elif answer.intents:
        print_intents(answer.intents)
    else:
        note("no intents")


def print_intents(sent: tuple[Intent, ...]) -> None:
    """Intents as a table, oldest first."""
    print_table(
        ("KIND", "AUDIENCE", "PRIORITY", "ITERATION", "INTENT", "PAYLOAD"),
        [
            [
                intent.kind,
                intent.audience,
                intent.priority,
                str(intent.iteration),
                intent.intent_id,
                intent_text(intent),
            ]
            for intent in sent
        ],
    )


def intent_text(intent: Intent) -> str:
    """What an intent says: its summary, where that is all it has, else its payload as JSON."""
    payload = intent.payload
    if isinstance(payload, dict) and set(payload) == {"summary_text"}:
        return str(payload["summary_text"])
    return json.dumps(payload, ensure_ascii=False)


def _payload(payload: str | None, summary: str | None) -> Any:
    if (payload is None) == (summary is None):
        raise click.UsageError("give either --payload JSON or --summary TEXT")
    if payload is None:
        return {"summary_text": summary}
    try:
        return json.loads(payload)
    except ValueError as error:
        raise click.UsageError(
            f"--payload is not JSON: {error}. For plain words use --summary TEXT"
        ) from error


def _tell(state: SidecarState, as_json: bool) -> None:
    if as_json:
        print_json(state)
    else:
        say(f"inbox version {state.inbox_version}; {state.buffer_depth} intents wait")


def _fields(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)[:5]
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'document'}: {plain(problem['msg'])}"
        for problem in problems
    )
