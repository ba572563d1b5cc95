"""The supervisor that `voidbus run` starts for itself, and scripts/demo, from start to end."""

from __future__ import annotations

import json
import os
import select
import subprocess
from pathlib import Path

import pytest
from served import VOIDBUS, clean_environment, workflow
from terminal import CTRL_C, Terminal

from voidbus.cli.state import find_supervisor
from voidbus.vm.image.store import default_store

# A program that says it runs and then waits to be ended.
WAITS = "echo ready; exec sleep 60"
DEMO = Path(__file__).parents[2] / "scripts" / "demo"


def test_run_starts_a_supervisor_for_itself_and_stops_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    spec = workflow(tmp_path / "a.json", "echo alone")
    with Terminal([*VOIDBUS, "run", str(spec)], clean_environment(state)) as terminal:
        terminal.wait_for(r"started a supervisor for this run \(process ")
        terminal.wait_for("alone\r\n")
        assert terminal.end() == 0
    assert find_supervisor(state) is None
    assert not (state / "supervisor.json").exists()


def test_ctrl_c_cancels_on_an_own_supervisor_and_leaves_nothing_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    spec = workflow(tmp_path / "a.json", WAITS)
    with Terminal([*VOIDBUS, "run", str(spec)], clean_environment(state)) as terminal:
        terminal.wait_for("ready")
        record = find_supervisor(state)
        assert record is not None
        terminal.type(CTRL_C)
        terminal.wait_for("cancelled")
        assert terminal.end() == 130
    assert not record.alive


def wait_gone(pidfd: int, timeout: float = 20.0) -> bool:
    """Whether a process ends in time. Closes the descriptor."""
    try:
        ready, _, _ = select.select([pidfd], [], [], timeout)
    finally:
        os.close(pidfd)
    return bool(ready)


def test_a_supervisor_of_its_own_ends_when_run_is_killed(tmp_path: Path) -> None:
    state = tmp_path / "state"
    spec = workflow(tmp_path / "a.json", WAITS)
    environ = clean_environment(state) | {"VOIDBUS_STOP_DEADLINE_SECS": "0.2"}
    command = [*VOIDBUS, "run", str(spec), "--policy", "cancel_grace_period_secs=1"]
    with Terminal(command, environ) as terminal:
        terminal.wait_for("ready")
        record = find_supervisor(state)
        assert record is not None
        pidfd = os.pidfd_open(record.pid)
        terminal.process.kill()
        assert wait_gone(pidfd)


def test_a_detached_run_keeps_its_supervisor_until_it_is_stopped(tmp_path: Path) -> None:
    state = tmp_path / "state"
    environ = clean_environment(state)
    spec = workflow(tmp_path / "a.json", WAITS)

    def voidbus(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*VOIDBUS, *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )

    started = voidbus("run", str(spec), "--detach", "--run-id", "kept")
    assert (started.returncode, started.stdout) == (0, "kept\n")
    assert f"voidbus stop --state-dir {state}" in started.stderr
    record = find_supervisor(state)
    assert record is not None
    try:
        assert json.loads(voidbus("inspect", "kept", "--json").stdout)["file"] == str(spec)
        stopped = voidbus("stop", "--runs", "cancel", "--deadline", "5")
        assert stopped.returncode == 0, stopped
        assert f"supervisor (process {record.pid}) stopped" in stopped.stdout
        assert "kept cancelled\n" in stopped.stdout
        assert not record.alive
        assert voidbus("ps").returncode == 3
    finally:
        if record.alive:
            os.kill(record.pid, 9)


def test_a_supervisor_that_cannot_start_is_explained_by_its_own_words(tmp_path: Path) -> None:
    state = tmp_path / "state"
    spec = workflow(tmp_path / "a.json", "true")
    environ = clean_environment(state) | {"VOIDBUS_LOG_LEVEL": "loud"}
    done = subprocess.run(
        [*VOIDBUS, "run", str(spec)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 3
    assert "VOIDBUS_LOG_LEVEL" in done.stderr
    assert str(state / "supervisor.log") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.needs("vm")
@pytest.mark.timeout(200)
def test_the_demo_runs_an_agent_without_a_terminal_or_a_home_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    cache = default_store().root.parents[1]  # the image is made once
    environ = clean_environment(tmp_path) | {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(cache)}
    del environ["HOME"], environ["VOIDBUS_STATE_DIR"]
    done = subprocess.run(
        [DEMO],
        env=environ,
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "demo succeeded in " in done.stdout
    assert "signal  broadcast" in done.stdout
    assert "stopped in " in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_the_demo_cancels_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    spec = workflow(tmp_path / "a.json", WAITS)
    place = tmp_path / "place"
    place.mkdir()
    environ = clean_environment(tmp_path) | {"TMPDIR": str(place)}
    with Terminal([str(DEMO), str(spec)], environ) as terminal:
        terminal.wait_for("ready", timeout=30.0)
        terminal.type(CTRL_C)
        terminal.wait_for("demo.*cancelled")
        assert terminal.end() == 130
    assert list(place.iterdir()) == []
