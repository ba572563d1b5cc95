"""docs/cli.md says what the commands are."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from voidbus.actors.messages.actor import ActorStatus, SystemStatus
from voidbus.actors.messages.runs import (
    CancelAccepted,
    EventPage,
    RunAccepted,
    RunEvent,
    RunList,
    RunReport,
    RunState,
    StageState,
)
from voidbus.actors.messages.sidecar import IntentList, SidecarState
from voidbus.actors.messages.telemetry import Sample, TelemetryPage
from voidbus.cli.commands import cli
from voidbus.cli.failure import ExitCode
from voidbus.sidecar.model import Intent
from voidbus.spec.policy import Policy

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def commands() -> list[tuple[str, click.Command]]:
    """Every command that does something, with its whole name."""
    context = click.Context(cli)
    found: list[tuple[str, click.Command]] = []
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [(f"{name} {part}", command.commands[part]) for part in command.commands]
        else:
            found.append((name, command))
    return found


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_and_option_is_documented(name: str, command: click.Command) -> None:
    heading = re.search(rf"^### `voidbus {name}[ `].*$", DOCS, re.MULTILINE)
    assert heading is not None, name
    section = DOCS[heading.end() :].partition("\n##")[0]
    for parameter in command.params:
        if not isinstance(parameter, click.Option) or parameter.hidden:
            continue
        if {"--state-dir", "--connect", "--keys"} & set(parameter.opts):  # said once, for all
            continue
        word = "JSON" if "--json" in parameter.opts else f"`{parameter.opts[-1]}"
        assert word in section or f"`{parameter.opts[-1]}" in section, (name, parameter.opts)
    assert command.help


@pytest.mark.parametrize(("name", "command"), commands())
def test_every_command_with_results_has_them_as_json(name: str, command: click.Command) -> None:
    options = [option for parameter in command.params for option in parameter.opts]
    # What these print is for the terminal they are in, or for a shell to read.
    assert ("--json" in options) is (name not in ("serve", "completion"))


@pytest.mark.parametrize(
    "model",
    [
        *(RunState, RunReport, StageState, RunEvent, RunList, EventPage, RunAccepted),
        *(CancelAccepted, Intent, IntentList, SidecarState, TelemetryPage, Sample),
        *(SystemStatus, ActorStatus, Policy),
    ],
)
def test_every_field_of_the_json_is_documented(model: type[BaseModel]) -> None:
    missing = [name for name in model.model_fields if f"`{name}`" not in DOCS]
    assert missing == []


# What commands put together themselves; the tests named after each command pin the same fields.
MADE = {
    "validate": "ok files file digest problems level line column field message found allowed "
    "suggestion",
    "doctor": "ok checks name status detail remedy",
    "artifacts": "run_id artifacts stage name media_type size_bytes digest",
    "console": "run_id console",
    "prune": "runs count size_bytes freed_bytes dry_run",
    "stop": "pid stopped seconds runs",
    "keys server": "public_key folder",
    "keys client": "name right file public_key",
    "image build": "name digest current kernel initramfs kernel_release unpacked_bytes "
    "least_memory_mb programs modules parts version sha256 size package layer",
    "image list": "store images agents",
    "image verify": "ok store problems",
    "image clean": "removed freed_bytes",
    "version": "voidbus python pyzmq libzmq kernel",
}


@pytest.mark.parametrize("name", MADE)
def test_the_fields_of_a_commands_own_document_stand_under_it(name: str) -> None:
    section = re.split(rf"^### `voidbus {name}[ `].*$", DOCS, flags=re.MULTILINE)[1]
    section = section.partition("\n##")[0]
    assert [field for field in MADE[name].split() if f"`{field}`" not in section] == []


def test_every_exit_code_is_documented() -> None:
    listed = [int(number) for number in re.findall(r"^\| (\d+) \|", DOCS, re.MULTILINE)]
    assert listed == [code.value for code in ExitCode]
