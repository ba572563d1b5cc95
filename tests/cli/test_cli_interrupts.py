"""Ctrl-C at any moment of a command: one line, 130, no traceback."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from served import VOIDBUS, clean_environment

INTERRUPTED = (130, "", "voidbus: interrupted\n")
AGENT = Path(__file__).parents[2] / "configs" / "agent.yaml"


def interrupted_after_import(number: int) -> tuple[int, list[str]]:
    """Ctrl-C for `voidbus ps` as soon as it has imported so many modules: its exit status, and
    its lines on standard error. The interpreter writes a line for each import; the pipe holds
    hardly more than that, so that the process is not far ahead of who reads it."""
    environment = clean_environment(Path("/nowhere/state"))
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", *VOIDBUS[1:], "ps"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        bufsize=0,
    ) as process:
        assert process.stderr is not None
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        seen, sent = b"", False
        while data := os.read(process.stderr.fileno(), 64):
            seen += data
            _, started, after = seen.partition(b" voidbus.cli\n")
            if started and not sent and after.count(b"\n") > number:
                process.send_signal(signal.SIGINT)
                sent = True
    lines = seen.decode().splitlines()
    return process.returncode, [line for line in lines if not line.startswith("import time:")]


@pytest.mark.parametrize("number", [10, 40, 70, 100, 130, 160])
def test_ctrl_c_at_any_moment_of_the_start_is_one_line(number: int) -> None:
    assert interrupted_after_import(number) == (130, ["voidbus: interrupted"])


def test_ctrl_c_is_not_heard_any_more_when_the_program_is_over() -> None:
    program = """
import signal, sys
from voidbus.cli.main import main
sys.argv = ["voidbus", "version"]
assert main() == 0
signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def ended(program: str, *arguments: str, state: Path) -> tuple[int, str, str]:
    """Run `program`, then `voidbus` with `arguments` in the same interpreter: how it ended.

    As `python -m`, for after that Python looks whether to kill itself for an interrupt.
    """
    lines = (
        "import signal, sys",
        "from voidbus.cli.main import main",
        f"sys.argv = {['voidbus', *arguments]!r}",
        program,
        "sys.exit(main())",
    )
    (state.parent / "begun.py").write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "begun"],
        cwd=state.parent,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(state),
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


COMMANDS = {
    "serve": ("serve", "--listen", "off"),
    "run": ("run", str(AGENT)),
    "validate": ("validate", str(AGENT)),
    "ps": ("ps",),
}

AT_MODULE = """
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {interrupt}
sys.meta_path.insert(0, Interrupt())
"""

# The signal itself; the exception out of a string of code, for which Python would kill itself at
# the end; and the signal lost on its way, as in a weak reference's callback.
SIGNAL = "signal.raise_signal(signal.SIGINT)"
STRING = "exec('raise KeyboardInterrupt')"
LOST = """
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
"""


@pytest.mark.parametrize("interrupt", [SIGNAL, STRING, LOST], ids=["signal", "string", "lost"])
@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("ps", "click"),
        ("ps", "voidbus.transport.leaf"),
        ("validate", "pydantic"),
        ("validate", "voidbus.spec.run"),
        ("run", "zmq"),
        ("run", "voidbus.actors.messages.runs"),
        ("serve", "click"),
        ("serve", "pydantic._internal._generate_schema"),
        ("serve", "voidbus.cli.supervisor_process"),
        ("serve", "voidbus.actors.journal"),
        ("serve", "voidbus.spec.supervisor"),
    ],
)
def test_ctrl_c_while_modules_are_imported_is_one_line(
    tmp_path: Path, command: str, module: str, interrupt: str
) -> None:
    program = AT_MODULE.format(module=module, interrupt=interrupt)
    assert ended(program, *COMMANDS[command], state=tmp_path / "state") == INTERRUPTED


AFTER_IMPORTS = """
class Interrupt:
    left = {number}
    def find_spec(self, name, path=None, target=None):
        Interrupt.left -= 1
        if Interrupt.left == 0:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize("number", [1, 25, 60, 110, 160, 210])
@pytest.mark.parametrize("command", ["serve", "run", "validate"])
def test_ctrl_c_at_any_import_is_one_line(tmp_path: Path, command: str, number: int) -> None:
    program = AFTER_IMPORTS.format(number=number)
    assert ended(program, *COMMANDS[command], state=tmp_path / "state") == INTERRUPTED


def test_ctrl_c_while_a_supervisor_comes_up_takes_it_down_again(tmp_path: Path) -> None:
    program = AT_MODULE.format(module="voidbus.gateway.actor", interrupt=SIGNAL)
    address = f"unix://{tmp_path}/api.sock"
    code, out, err = ended(program, "serve", "--listen", address, state=tmp_path / "state")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "voidbus: interrupted"
    assert "Traceback" not in err
    assert not (tmp_path / "state" / "supervisor.json").exists()


def test_an_error_made_of_an_interrupt_is_told_as_one(tmp_path: Path) -> None:
    program = f"""
import voidbus.cli.validate
def wrapped(*_):
    try:
        {SIGNAL}
    except KeyboardInterrupt as interrupt:
        raise ValueError("made of it") from interrupt
voidbus.cli.validate._problems = wrapped
"""
    assert ended(program, *COMMANDS["validate"], state=tmp_path / "state") == INTERRUPTED


def test_an_interrupt_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    program = "signal.signal(signal.SIGINT, signal.SIG_IGN)" + AT_MODULE.format(
        module="voidbus.spec.run", interrupt=SIGNAL
    )
    code, _, err = ended(program, *COMMANDS["validate"], state=tmp_path / "state")
    assert (code, err) == (0, "")
