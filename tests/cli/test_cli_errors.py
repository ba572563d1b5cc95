"""What goes wrong: no supervisor, a stuck one, wrong usage, faults of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_supervisor import FakeSupervisor, start_time

from voidbus.actors.messages.runs import ListRuns
from voidbus.cli import connect as connecting
from voidbus.cli.commands import ENTRIES
from voidbus.cli.state import find_supervisor, process_start_time, state_directory

Voidbus = Callable[..., Any]


def test_without_a_supervisor_commands_exit_with_3_and_say_how_to_start_one(
    voidbus: Voidbus, state: Path
) -> None:
    for arguments in (("ps",), ("inspect", "x"), ("actors",), ("stop",), ("cancel", "x")):
        result = voidbus(*arguments)
        assert result.code == 3, arguments
        assert f"voidbus serve --state-dir {state}" in result.err
        assert "voidbus run FILE" in result.err
        assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("made", [None, 0o644])
def test_a_supervisor_whose_virtiofsd_is_no_program_does_not_start_and_says_so(
    voidbus: Voidbus,
    state: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: int | None,
) -> None:
    program = tmp_path / "virtiofsd"
    if made is not None:
        program.touch(mode=made)
    monkeypatch.setenv("VOIDBUS_MACHINES__VIRTIOFSD", str(program))
    result = voidbus("serve", "--listen", "off")
    assert result.code == 1
    assert f"machines.virtiofsd: {program} is no program" in result.err
    assert "install virtiofsd 1.13 or later" in result.err
    assert len(result.err.splitlines()) == 1
    assert not state.exists()


def test_a_virtiofsd_that_is_no_absolute_path_is_a_mistake_in_the_configuration(
    voidbus: Voidbus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VOIDBUS_MACHINES__VIRTIOFSD", "virtiofsd")
    result = voidbus("serve", "--listen", "off")
    assert result.code == 2
    assert "machines.virtiofsd: it must be an absolute path (found 'virtiofsd')" in result.err


def test_the_record_of_a_supervisor_that_ended_is_not_believed(
    voidbus: Voidbus, state: Path, supervisor: FakeSupervisor
) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pid, started = process.pid, start_time(process.pid)
        supervisor.record(pid=pid, start_time=started)
        assert find_supervisor(state) is not None
        supervisor.record(pid=pid, start_time=started - 1)  # the pid was used again
        assert find_supervisor(state) is None
        supervisor.record(pid=pid, start_time=started)
        process.communicate(b"\n")
    result = voidbus("ps")
    assert result.code == 3
    assert f"process {pid}, has ended" in result.err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}', "\udcff"])
def test_a_damaged_record_is_no_supervisor(voidbus: Voidbus, state: Path, text: str) -> None:
    state.mkdir()
    (state / "supervisor.json").write_bytes(text.encode(errors="surrogateescape"))
    assert voidbus("ps").code == 3


def test_a_supervisor_that_does_not_answer_is_named_with_its_process(
    voidbus: Voidbus,
    state: Path,
    supervisor: FakeSupervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connecting.connect, "__kwdefaults__", {"link_timeout": 0.2})
    supervisor.hub.close()
    result = voidbus("ps")
    assert result.code == 3
    assert f"kill {os.getpid()}" in result.err
    assert "observe.sock" in result.err


def test_a_question_without_an_answer_times_out(
    voidbus: Voidbus, supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting.Supervisor.ask, "__defaults__", (0.2,))
    supervisor.answers[ListRuns] = lambda delivery: None
    result = voidbus("ps")
    assert result.code == 124
    assert "supervisor/journal did not answer in time" in result.err


def test_a_supervisor_that_ends_meanwhile_is_said_to_be_lost(
    voidbus: Voidbus, supervisor: FakeSupervisor
) -> None:
    # Not on the hub's own thread, which can't wait for itself.
    closing = threading.Thread(target=supervisor.hub.close)
    supervisor.answers[ListRuns] = lambda delivery: closing.start()
    result = voidbus("ps")
    closing.join()
    assert result.code == 3
    assert "the connection to the supervisor was lost" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("ps", "--nonsense"),
        ("inspect",),
        ("events", "x", "--since", "never"),
        ("ps", "--state", "asleep"),
        ("run",),
        ("completion", "tcsh"),
    ],
)
def test_wrong_usage_exits_with_2_in_one_line(voidbus: Voidbus, arguments: tuple[str, ...]) -> None:
    result = voidbus(*arguments)
    assert result.code == 2
    assert result.err.startswith("voidbus: error: ")
    assert "--help" in result.err
    assert "Traceback" not in result.err


def test_a_fault_of_ours_is_one_line_and_a_traceback_only_on_request(
    voidbus: Voidbus, supervisor: FakeSupervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("voidbus.cli.runs.print_table", broken)
    result = voidbus("ps")
    assert result.code == 1
    assert "ZeroDivisionError" in result.err
    assert "Traceback" not in result.err
    monkeypatch.setenv("VOIDBUS_DEBUG", "1")
    assert "Traceback" in voidbus("ps").err


def test_help_and_version_exit_with_0(voidbus: Voidbus) -> None:
    for arguments in (("--help",), ("ps", "-h"), ("inbox", "put", "--help"), ("--version",)):
        result = voidbus(*arguments)
        assert result.code == 0
        assert result.out
    assert json.loads(voidbus("version", "--json").out)["voidbus"]


def test_every_command_in_the_list_can_be_loaded(voidbus: Voidbus) -> None:
    listed = voidbus("--help").out.partition("Commands:")[2].split("\n")
    names = [line.split()[0] for line in listed if line.startswith("  ")]
    assert names == list(ENTRIES)
    for name in names:
        assert voidbus(name, "--help").code == 0, name


def test_the_state_directory_is_found_in_the_documented_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VOIDBUS_STATE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_directory(tmp_path / "given") == tmp_path / "given"
    assert state_directory(None) == tmp_path / "named"
    monkeypatch.delenv("VOIDBUS_STATE_DIR")
    assert state_directory(None) == tmp_path / "xdg" / "voidbus"
    monkeypatch.setenv("XDG_STATE_HOME", "relative/is/ignored")
    assert state_directory(None) == tmp_path / "home" / ".local" / "state" / "voidbus"


def test_the_cli_and_the_supervisor_agree_on_the_state_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from voidbus.spec.supervisor import load_supervisor_config

    monkeypatch.chdir(tmp_path)
    for variables in (
        {"VOIDBUS_STATE_DIR": str(tmp_path / "named")},
        {"XDG_STATE_HOME": str(tmp_path / "xdg")},
        {"XDG_STATE_HOME": "relative"},
        {},
    ):
        for name in ("VOIDBUS_STATE_DIR", "XDG_STATE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert load_supervisor_config(None, os.environ, {}).state_dir == state_directory(None)


def test_the_option_is_taken_before_and_after_the_command(voidbus: Voidbus, tmp_path: Path) -> None:
    for arguments in (("--state-dir", tmp_path / "x", "ps"), ("ps", "--state-dir", tmp_path / "x")):
        assert f"no supervisor runs on {tmp_path / 'x'}." in voidbus(*arguments).err


def test_a_process_that_has_ended_has_no_start_time() -> None:
    assert process_start_time(os.getpid()) == start_time(os.getpid())
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert process_start_time(process.pid) == 0  # a zombie
    process.wait()
    assert process_start_time(process.pid) == 0
