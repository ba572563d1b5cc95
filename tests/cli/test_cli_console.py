"""`voidbus console`: what a guest wrote reaches no terminal as it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor
from served import VOIDBUS, Served, workflow
from terminal import Terminal

from voidbus.actors.messages.runs import ConsoleText, ReadConsole

Voidbus = Callable[..., Any]

# A title, cleared screens by ESC and by C1, a bell, a backspace, and text that reads backwards.
HOSTILE = "one\r\n\x1b]0;owned\x07two\x1b[2J\r\n\x9b2Jthree\x08\x00\u202e\ttab\r\n"
SHOWN = [
    "one",
    "\\x1b]0;owned\\x07two\\x1b[2J",
    "\\x9b2Jthree\\x08\\x00\\u202e\ttab",
]


def say(supervisor: FakeSupervisor, text: str) -> None:
    """Every run's console has this text."""
    supervisor.answers[ReadConsole] = lambda delivery: delivery.reply(ConsoleText(text=text))


def test_control_characters_of_a_console_are_made_visible(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a")
    say(supervisor, HOSTILE)
    result = voidbus("console", "run-a")
    assert (result.code, result.err) == (0, "")
    assert result.out.split("\n") == [*SHOWN, ""]


def test_json_has_a_console_as_it_is_and_is_plain_ascii_all_the_same(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a")
    say(supervisor, HOSTILE)
    result = voidbus("console", "run-a", "--json")
    assert result.code == 0
    assert json.loads(result.out) == {"run_id": "run-a", "console": HOSTILE}
    assert result.out.isascii()
    assert not set(result.out) & {"\x1b", "\x07", "\x08", "\x00"}


def test_a_console_is_asked_of_the_run_whose_id_begins_so(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("alpha-1")
    supervisor.add_run("beta-1")
    say(supervisor, "booted\n")
    assert voidbus("console", "al").out == "booted\n"
    assert supervisor.wait_for(ReadConsole) == ReadConsole(run_id="alpha-1")


def test_a_console_nothing_was_written_to_is_said_to_be_empty(
    supervisor: FakeSupervisor, voidbus: Voidbus
) -> None:
    supervisor.add_run("run-a")
    say(supervisor, "")
    result = voidbus("console", "run-a")
    assert (result.code, result.out, result.err) == (0, "", "the console is empty\n")
    assert json.loads(voidbus("console", "run-a", "--json").out)["console"] == ""


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_console_of_an_unknown_run_exits_with_4(
    supervisor: FakeSupervisor, voidbus: Voidbus, options: tuple[str, ...]
) -> None:
    supervisor.add_run("run-a")
    result = voidbus("console", "zzz", *options)
    assert (result.code, result.out) == (4, "")
    assert result.err.startswith("voidbus: error: there is no run 'zzz'")
    assert "voidbus ps --all" in result.err


def test_a_console_that_was_kept_is_shown_and_one_that_was_not_is_an_error(
    state: Path, tmp_path: Path
) -> None:
    with Served(state) as served:
        for name in ("one", "two"):
            started = served.voidbus(
                "run", workflow(tmp_path / f"{name}.json", "true"), "--run-id", name
            )
            assert started.returncode == 0, started.stderr
        # A machine that is no virtual one has a console, to which nothing is written.
        empty = served.voidbus("console", "one")
        assert (empty.returncode, empty.stdout) == (0, "")
        assert empty.stderr == "the console is empty\n"
        (state / "consoles/one.log").write_bytes(os.fsencode(HOSTILE) + b"\xff\xfe")
        (state / "consoles/two.log").unlink()
        with Terminal([*VOIDBUS, "console", "one"], served.environ) as terminal:
            assert terminal.end() == 0
            lines = terminal.seen.decode().split("\r\n")
        assert lines == [*SHOWN, "\ufffd\ufffd", ""]
        for options in ((), ("--json",)):
            lost = served.voidbus("console", "two", *options)
            assert (lost.returncode, lost.stdout) == (1, "")
            assert lost.stderr == (
                "voidbus: error: no console of run two was kept: it had no machine, or 200 others "
                "have ended since. Its events say what became of it: voidbus events two\n"
            )
