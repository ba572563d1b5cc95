"""Commands as operators have them: on terminals, in pipes, beside a real supervisor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import VOIDBUS, Served, workflow
from terminal import CTRL_C, Terminal

# A program that says it runs and then waits to be ended.
WAITS = "echo ready; exec sleep 60"
# The same, but deaf to a polite signal.
DEAF = "trap '' TERM; echo ready; while :; do sleep 1; done"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("served") / "state") as supervisor:
        yield supervisor


def on_terminal(served: Served, *arguments: object) -> Terminal:
    return Terminal([*VOIDBUS, *map(str, arguments)], served.environ)


def test_run_on_a_terminal_shows_progress_in_place_and_then_the_result(
    served: Served, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    spec = workflow(tmp_path / "a.json", f"echo one; echo two >&2; cat {gate}")
    with on_terminal(served, "run", spec, "--run-id", "live") as terminal:
        terminal.wait_for("greet.*running")
        terminal.wait_for("greet[|] two")
        gate.write_text("three\n")
        terminal.wait_for("greet.*succeeded")
        terminal.wait_for("live.*succeeded.* in ")
        terminal.wait_for("tokens in")
        terminal.wait_for("one\r\nthree\r\n")
        assert terminal.end() == 0
    assert served.states()["live"] == "succeeded"


def test_a_program_in_a_guest_cannot_act_on_the_operators_terminal(
    served: Served, tmp_path: Path
) -> None:
    spec = workflow(tmp_path / "a.json", r"printf '\033]0;owned\007\033[2Jx\n'")
    for arguments in (("run", spec, "--run-id", "hostile"), ("logs", "hostile")):
        with on_terminal(served, *arguments) as terminal:
            assert terminal.end() == 0
            assert b"\x1b]0;" not in terminal.seen
            assert b"\\x1b]0;owned\\x07\\x1b[2Jx" in terminal.seen


def test_the_first_ctrl_c_cancels_the_run_and_waits_for_its_end(
    served: Served, tmp_path: Path
) -> None:
    spec = workflow(tmp_path / "a.json", WAITS)
    with on_terminal(served, "run", spec, "--run-id", "interrupted") as terminal:
        terminal.wait_for("ready")
        terminal.type(CTRL_C)
        terminal.wait_for("cancelling interrupted; .* Ctrl-C again leaves at once")
        terminal.wait_for("interrupted.*cancelled")
        assert terminal.end() == 130
        assert b"Traceback" not in terminal.seen
    assert served.states()["interrupted"] == "cancelled"


def test_a_second_ctrl_c_leaves_at_once(served: Served, tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", DEAF)
    policy = "cancel_grace_period_secs=60"  # longer than a busy machine needs for what follows
    with on_terminal(served, "run", spec, "--run-id", "deaf", "--policy", policy) as terminal:
        terminal.wait_for("ready")
        terminal.type(CTRL_C)
        terminal.wait_for("cancelling deaf")
        terminal.type(CTRL_C)
        terminal.wait_for("voidbus: interrupted\r\n", timeout=5.0)
        assert terminal.end(5.0) == 130
        assert b"Traceback" not in terminal.seen
    assert served.states()["deaf"] == "running"
    assert served.voidbus("cancel", "deaf", "--grace", "0").stdout == "deaf cancelled\n"


def test_another_terminal_sees_the_run_and_cancels_it(served: Served, tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", WAITS)
    with on_terminal(served, "run", spec, "--run-id", "watched") as first:
        first.wait_for("ready")
        with on_terminal(served, "ps") as second:
            second.wait_for("\x1b\\[1mRUN")
            second.wait_for("watched +\x1b\\[36mrunning\x1b\\[0m")
            assert second.end() == 0
        listed = served.voidbus("actors")
        assert listed.returncode == 0, listed
        assert "run-watched (process " in listed.stdout
        done = served.voidbus("cancel", "watch", "--reason", "seen enough", "--grace", "1")
        assert (done.returncode, done.stdout) == (0, "watched cancelled\n")
        first.wait_for("reason: seen enough")
        assert first.end() == 5


def test_no_color_is_honoured_on_a_terminal(served: Served, tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", "echo plain")
    environ = served.environ | {"NO_COLOR": "1"}
    for arguments in (("run", spec), ("ps", "--all"), ("doctor",), ("actors",)):
        with Terminal([*VOIDBUS, *map(str, arguments)], environ) as terminal:
            # What doctor comes to depends on the host: here it sees no guest image, for one.
            assert terminal.end() in ((0, 1) if arguments == ("doctor",) else (0,))
            assert terminal.seen
            assert b"\x1b" not in terminal.seen


def test_ctrl_c_in_a_command_that_waits_is_one_line(served: Served, tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", WAITS)
    assert served.voidbus("run", spec, "--detach", "--run-id", "followed").returncode == 0
    with on_terminal(served, "logs", "followed", "--follow") as terminal:
        terminal.wait_for("ready\r\n")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
        assert terminal.seen == b"^Cvoidbus: interrupted\r\n"
    assert served.states()["followed"] == "running"
    assert served.voidbus("cancel", "followed", "--grace", "1").returncode == 0


def test_a_reader_that_goes_away_is_no_error(served: Served, tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", "for i in $(seq 400); do echo line $i; done")
    assert served.voidbus("run", spec, "--run-id", "long").returncode == 0
    voidbus = " ".join(VOIDBUS)
    for command in ("events long", "logs long --follow", "events long --json", "ps --all"):
        done = subprocess.run(
            ["bash", "-c", f"{voidbus} {command} | head -n 1; exit ${{PIPESTATUS[0]}}"],
            env=served.environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.stderr == ""
        assert len(done.stdout.splitlines()) == 1
        # What was written before the reader went may have been all there was.
        assert done.returncode in (0, 141)


def test_output_that_is_closed_from_the_start_is_survived(served: Served) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{' '.join(VOIDBUS)} ps --all >&-"],
        env=served.environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr


def test_a_shell_completes_commands_and_run_ids(served: Served, tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", "true")
    assert served.voidbus("run", spec, "--run-id", "zebra-1").returncode == 0
    script = served.voidbus("completion", "bash")
    assert script.returncode == 0
    (tmp_path / "script").write_text(script.stdout)
    (tmp_path / "voidbus").write_text(f'#!/bin/sh\nexec {" ".join(VOIDBUS)} "$@"\n')
    (tmp_path / "voidbus").chmod(0o755)
    environ = served.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PS1": "$ "}
    with Terminal(["bash", "--norc", "--noprofile", "-i"], environ) as shell:
        shell.type(f". {tmp_path}/script && echo set\\up\n".encode())
        shell.wait_for("setup\r\n")
        shell.type(b"voidbus insp\t")
        shell.wait_for("inspect ")
        shell.type(b"zeb\t")
        shell.wait_for("zebra-1 ")
        shell.type(b'--json | grep -c \'"id": "zebra-1"\'\n')
        shell.wait_for("[\r\n]1\r\n")
        shell.type(b"exit\n")
        assert shell.end() == 0


def test_a_follower_outlives_a_crash_of_the_supervisor(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    spec = workflow(tmp_path / "a.json", f"echo ready; cat {gate}; echo done")
    with (
        Served(tmp_path / "state") as served,
        on_terminal(served, "run", spec, "--run-id", "adopted") as terminal,
    ):
        terminal.wait_for("ready")
        served.crash()
        terminal.wait_for("lost the supervisor; waiting up to 30 s")
        served.start_again()
        terminal.wait_for("the supervisor is back")
        gate.write_text("open\n")
        terminal.wait_for("adopted.*succeeded.* in ")
        terminal.wait_for("ready\r\nopen\r\ndone\r\n")
        assert terminal.end() == 0


def test_a_run_is_cancelled_when_its_terminal_goes_away(served: Served, tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", WAITS)
    with on_terminal(served, "run", spec, "--run-id", "hung-up") as terminal:
        terminal.wait_for("ready")
        terminal.process.send_signal(signal.SIGHUP)
        terminal.wait_for("hung-up.*cancelled")
        assert terminal.end() == 130


def test_a_run_under_nohup_is_not_cancelled_by_the_terminal(served: Served, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    spec = workflow(tmp_path / "a.json", f"echo ready; cat {gate}")
    command = ["sh", "-c", f"trap '' HUP; exec {' '.join(VOIDBUS)} run {spec}"]
    with Terminal(command, served.environ) as terminal:
        terminal.wait_for("ready")
        terminal.process.send_signal(signal.SIGHUP)
        gate.write_text("open\n")
        terminal.wait_for("succeeded.* in ")
        assert terminal.end() == 0


def test_ps_imports_only_what_it_needs(served: Served) -> None:
    """A cold `voidbus ps` is nearly all imports; each of these would cost tens of milliseconds."""
    program = (
        "import sys; from voidbus.cli.main import main; code = main(['ps']);"
        "heavy = {'rich', 'yaml', 'aiohttp', 'pykka', 'voidbus.sidecar', 'voidbus.spec'};"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=served.environ,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr.splitlines()[-1] == ""


def agent(path: Path, **environ: str) -> Path:
    """A specification of the stand-in agent, which can send messages."""
    path.write_text(
        json.dumps(
            {
                "api_version": "v1",
                "kind": "agent",
                "name": "scout",
                "sandbox": {"mode": "mock", "env": environ},
                "agent": {
                    "prompt": "look around",
                    "output_file": "/workspace/output.json",
                    "messaging": {"enabled": True},
                },
            }
        )
    )
    return path


def test_operators_write_to_a_live_agents_inbox(served: Served, tmp_path: Path) -> None:
    spec = agent(tmp_path / "a.json", CLAUDIO_TURNS="2", CLAUDIO_DELAY_MS="30000")
    with on_terminal(served, "run", spec, "--run-id", "talk") as terminal:
        terminal.wait_for("scout.*running")
        inbox = tmp_path / "inbox.json"
        inbox.write_text(
            json.dumps({"execution_id": "e", "candidate_id": "c", "iteration": 1, "entries": []})
        )
        put = served.voidbus("inbox", "put", "talk", inbox, "--json")
        assert put.returncode == 0, put
        version = json.loads(put.stdout)["inbox_version"]
        sent = served.voidbus("message", "talk", "--kind", "signal", "--summary", "hi", "--json")
        assert sent.returncode == 0, sent
        assert json.loads(sent.stdout)["inbox_version"] == version + 1
        seen = json.loads(served.voidbus("inspect", "talk", "--json").stdout)
        assert seen["sidecar"]["inbox_version"] == version + 1
        assert served.voidbus("cancel", "talk", "--grace", "0").returncode == 0
        assert terminal.end() == 5


def test_intents_are_there_after_the_run_until_they_are_drained(
    served: Served, tmp_path: Path
) -> None:
    spec = agent(tmp_path / "a.json", CLAUDIO_INTENTS="2", CLAUDIO_DELAY_MS="1")
    assert served.voidbus("run", spec, "--run-id", "sender").returncode == 0
    kept = json.loads(served.voidbus("intents", "sender", "--json").stdout)["intents"]
    assert len(kept) == 2
    drained = json.loads(served.voidbus("intents", "sender", "--drain", "--json").stdout)
    assert drained["intents"] == kept
    assert served.voidbus("intents", "sender").stderr == "no intents\n"
