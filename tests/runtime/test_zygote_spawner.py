from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from voidbus.actors.runtime.process import (
    ProcessGoneError,
    ProcessIdentity,
    descendants,
    identity_of,
    kill_leftover,
)
from voidbus.actors.runtime.process_entry import MAX_CONFIG
from voidbus.actors.runtime.spawned import ZygoteGoneError, describe_returncode
from voidbus.actors.runtime.spawner import Spawner
from voidbus.actors.runtime.zygote import Zygote

Exits = queue.Queue[tuple[ProcessIdentity, int | None]]
KITS = str(Path(__file__).parents[1] / "kits")


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No descriptor, thread or process may outlive a test."""
    monkeypatch.setenv("PYTHONPATH", KITS)
    fds = sorted(str(fd) for fd in Path("/proc/self/fd").iterdir())
    threads = set(threading.enumerate())
    yield
    assert sorted(str(fd) for fd in Path("/proc/self/fd").iterdir()) == fds
    assert set(threading.enumerate()) == threads
    with pytest.raises(ChildProcessError):  # neither zombies nor running ones
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture
def exits() -> Exits:
    return queue.Queue()


@pytest.fixture(params=["zygote", "exec"])
def spawner(request: pytest.FixtureRequest, exits: Exits) -> Iterator[Spawner]:
    with Spawner(
        on_exit=lambda *end: exits.put(end),
        preload=["run_entries"],
        use_zygote=request.param == "zygote",
    ) as made:
        yield made


def way(request: pytest.FixtureRequest) -> str:
    return "zygote" if "zygote" in request.node.callspec.id else "exec"


@pytest.mark.parametrize("code", [0, 3, 255])
def test_an_exit_code_reaches_the_owner(
    spawner: Spawner, exits: Exits, code: int, request: pytest.FixtureRequest
) -> None:
    spawned = spawner.spawn("run_entries:exits_with", str(code).encode())
    with spawned.handle:
        assert spawned.by == way(request)
        assert exits.get(timeout=20) == (spawned.identity, code)
        assert not spawned.handle.alive()


def test_a_killed_process_is_reported_as_subprocess_would(spawner: Spawner, exits: Exits) -> None:
    spawned = spawner.spawn("run_entries:waits_forever", b"")
    with spawned.handle:
        assert identity_of(spawned.identity.pid) == spawned.identity
        spawned.handle.signal(signal.SIGKILL)
        assert exits.get(timeout=20) == (spawned.identity, -9)


def test_a_process_starts_clean(spawner: Spawner, exits: Exits, tmp_path: Path) -> None:
    """Its own session, no stray descriptors, default signals, the config nowhere to be seen."""
    path, log = tmp_path / "report", tmp_path / "log"
    config = json.dumps({"path": str(path), "secret": "s3cr3t" + "x" * 3_000_000}).encode()
    env = {"PYTHONPATH": KITS, "GREETING": "hello"}
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        spawned = spawner.spawn(
            "run_entries:writes_report", config, env=env, log_path=log, title="run-with-long-name"
        )
    finally:
        signal.signal(signal.SIGHUP, old)
    with spawned.handle:
        assert exits.get(timeout=20) == (spawned.identity, 0)
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["pid"] == report["session"] == spawned.identity.pid
    assert report["fds"][:3] == [0, 1, 2]
    assert len(report["fds"]) == 4  # the fourth lists the directory
    assert report["comm"] == "run-with-long-n"
    assert report["env"].items() >= env.items()
    assert set(report["env"]) <= {*env, "LC_CTYPE"}  # Python's own, PEP 538
    assert "s3cr3t" not in report["cmdline"]
    assert set(report["ignored"]) <= {signal.SIGPIPE, signal.SIGXFSZ}
    assert report["blocked"] == []
    assert report["threads"] == 1
    assert report["size"] == len(config)
    assert sorted(log.read_text().split()) == ["err", "out"]
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("run_entries:raises", "this run went wrong: because"),
        ("run_entries:nothing_here", "AttributeError"),
        ("no_such_module_here:main", "ModuleNotFoundError"),
    ],
)
def test_a_failed_entry_leaves_its_traceback_in_the_log(
    spawner: Spawner, exits: Exits, tmp_path: Path, entry: str, words: str
) -> None:
    log = tmp_path / "log"
    spawned = spawner.spawn(entry, b"because", log_path=log)
    with spawned.handle:
        assert exits.get(timeout=20) == (spawned.identity, 70)
    assert words in log.read_text()


def test_nothing_runs_that_could_not_be_recorded(
    spawner: Spawner, exits: Exits, tmp_path: Path
) -> None:
    seen: list[ProcessIdentity] = []

    def refuse(identity: ProcessIdentity) -> None:
        seen.append(identity_of(identity.pid))
        raise OSError("the journal is full")

    path = tmp_path / "report"
    config = json.dumps({"path": str(path)}).encode()
    with pytest.raises(OSError, match="journal"):
        spawner.spawn("run_entries:writes_report", config, record=refuse)
    # The next one proves that the refused one's end has been passed over.
    with spawner.spawn("run_entries:exits_with", b"4").handle as handle:
        assert exits.get(timeout=20) == (handle.identity, 4)
    assert not path.exists()
    assert len(seen) == 1


def test_bad_requests_are_refused_before_anything_starts(exits: Exits, tmp_path: Path) -> None:
    allowed = frozenset({"run_entries:exits_with"})
    with Spawner(on_exit=lambda *end: exits.put(end), entries=allowed) as spawner:
        with pytest.raises(ValueError, match="not among"):
            spawner.spawn("os:system", b"")
        with pytest.raises(ValueError, match="at most"):
            spawner.spawn("run_entries:exits_with", bytes(MAX_CONFIG + 1))
        with pytest.raises(FileNotFoundError):
            spawner.spawn("run_entries:exits_with", b"0", log_path=tmp_path / "no" / "log")
    with pytest.raises(RuntimeError, match="closed"):
        spawner.spawn("run_entries:exits_with", b"0")


def test_many_threads_can_spawn_at_once(exits: Exits) -> None:
    with (
        Spawner(on_exit=lambda *end: exits.put(end), preload=["run_entries"]) as spawner,
        ThreadPoolExecutor(8) as pool,
    ):

        def one(code: int) -> tuple[ProcessIdentity, int]:
            spawned = spawner.spawn("run_entries:exits_with", str(code).encode())
            spawned.handle.close()
            assert spawned.by == "zygote"
            return spawned.identity, code

        expected = set(pool.map(one, range(40)))
        assert {exits.get(timeout=20) for _ in range(40)} == expected


def test_a_dead_zygote_is_restarted_and_its_processes_are_still_watched(
    exits: Exits, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Spawner(on_exit=lambda *end: exits.put(end), preload=["run_entries"]) as spawner:
        first = spawner.spawn("run_entries:waits_for_the_end_of_a_pipe", bytes(fifo))
        zygote = os.open(fifo, os.O_WRONLY)
        parent = next(i for i in descendants(os.getpid()) if i != first.identity)
        assert kill_leftover(parent)
        second = spawner.spawn("run_entries:exits_with", b"0")
        assert second.by == "zygote"
        assert exits.get(timeout=20) == (second.identity, 0)
        assert first.handle.alive()
        os.close(zygote)
        assert exits.get(timeout=20) == (first.identity, None)
        first.handle.close()
        second.handle.close()


def test_no_process_is_forgotten_when_its_zygote_is_replaced_before_its_death_was_read(
    exits: Exits, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    go_on = threading.Event()

    def on_exit(*end: Any) -> None:
        exits.put(end)
        if end[1] == 3:
            go_on.wait(20)  # so long the zygote's end is not read

    with Spawner(on_exit=on_exit, preload=["run_entries"]) as spawner:
        first = spawner.spawn("run_entries:waits_for_the_end_of_a_pipe", bytes(fifo))
        pipe = os.open(fifo, os.O_WRONLY)
        zygote = next(i for i in descendants(os.getpid()) if i != first.identity)
        busy = spawner.spawn("run_entries:exits_with", b"3")
        assert exits.get(timeout=20) == (busy.identity, 3)
        assert kill_leftover(zygote)

        def let_it_be_read() -> None:
            while zygote in descendants(os.getpid()):  # until it is reaped, to be replaced
                go_on.wait(0.01)
            go_on.set()

        reading = threading.Thread(target=let_it_be_read)
        reading.start()
        second = spawner.spawn("run_entries:exits_with", b"0")
        reading.join(20)
        os.close(pipe)
        ended = {exits.get(timeout=20), exits.get(timeout=20)}
        assert ended == {(first.identity, None), (second.identity, 0)}
        for spawned in (first, busy, second):
            spawned.handle.close()


def test_exec_serves_where_the_zygote_cannot_start(
    exits: Exits, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Spawner(on_exit=lambda *end: exits.put(end)) as spawner:
        monkeypatch.setattr("voidbus.actors.runtime.zygote._MODULE", "no_such_module_here")
        spawned = spawner.spawn("run_entries:exits_with", b"6")
        with spawned.handle:
            assert spawned.by == "exec"
            assert exits.get(timeout=20) == (spawned.identity, 6)
    assert "does not start" in caplog.text


def test_a_stopped_zygote_makes_spawn_end_in_time_and_start_by_exec(exits: Exits) -> None:
    with Spawner(on_exit=lambda *end: exits.put(end), preload=["run_entries"]) as spawner:
        spawner.start()
        [zygote] = descendants(os.getpid())
        os.kill(zygote.pid, signal.SIGSTOP)
        spawned = spawner.spawn("run_entries:exits_with", b"8", timeout=1)
        os.kill(zygote.pid, signal.SIGCONT)
        with spawned.handle:
            assert spawned.by == "exec"
            # Only this one: what the zygote forks for the abandoned request ends at its gate.
            assert exits.get(timeout=20) == (spawned.identity, 8)
    assert exits.empty()


def test_runs_outlive_the_spawner_and_the_zygote_does_not(exits: Exits, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Spawner(on_exit=lambda *end: exits.put(end), preload=["run_entries"]) as spawner:
        spawned = spawner.spawn("run_entries:waits_for_the_end_of_a_pipe", bytes(fifo))
        keeper = os.open(fifo, os.O_WRONLY)
    with spawned.handle as handle:
        assert handle.alive()
        os.close(keeper)
        assert handle.wait(20)
    assert exits.empty()


def test_runs_outlive_a_killed_supervisor_and_the_zygote_ends_with_it(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    program = (
        "import os, signal, sys\n"
        "from voidbus.actors.runtime.process import descendants\n"
        "from voidbus.actors.runtime.spawner import Spawner\n"
        "spawner = Spawner(on_exit=print, preload=['run_entries'])\n"
        "entry = 'run_entries:waits_for_the_end_of_a_pipe'\n"
        "run = spawner.spawn(entry, sys.argv[1].encode()).identity\n"
        "zygote = next(i for i in descendants(os.getpid()) if i != run)\n"
        "print(run.pid, zygote.pid, flush=True)\n"
        "signal.pause()\n"
    )
    command = [sys.executable, "-P", "-c", program, str(fifo)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        run_pid, zygote_pid = map(int, supervisor.stdout.readline().split())
        run, zygote = os.pidfd_open(run_pid), os.pidfd_open(zygote_pid)
        keeper = os.open(fifo, os.O_WRONLY)
        supervisor.kill()
    assert ended(zygote, 20)
    assert not ended(run, 0)
    os.close(keeper)
    assert ended(run, 20)
    for fd in (run, zygote):
        os.close(fd)


def ended(pidfd: int, timeout: float) -> bool:
    import select

    return bool(select.select([pidfd], [], [], timeout)[0])


def test_a_failed_preload_is_reported_and_no_reason_to_stop(exits: Exits) -> None:
    zygote = Zygote(["json", "no_such_module_here"], on_exit=lambda *end: exits.put(end))
    zygote.start(20)
    try:
        assert set(zygote.preload_errors) == {"no_such_module_here"}
        assert "ModuleNotFoundError" in zygote.preload_errors["no_such_module_here"]
        with zygote.spawn("run_entries:exits_with", b"1", timeout=20).handle as handle:
            assert exits.get(timeout=20) == (handle.identity, 1)
    finally:
        zygote.close()
    with pytest.raises(ZygoteGoneError):
        zygote.spawn("run_entries:exits_with", b"1", timeout=20)
    with pytest.raises(ProcessGoneError):
        identity_of(handle.identity.pid)


def test_what_a_run_needs_is_loaded_before_it_starts(exits: Exits, tmp_path: Path) -> None:
    path = tmp_path / "report"
    preload = ["run_entries", "aiohttp", "pydantic", "zmq"]
    with Spawner(on_exit=lambda *end: exits.put(end), preload=preload) as spawner:
        config = json.dumps({"path": str(path)}).encode()
        spawned = spawner.spawn("run_entries:writes_report", config)
        with spawned.handle:
            assert spawned.by == "zygote"
            assert exits.get(timeout=20) == (spawned.identity, 0)
    report = json.loads(path.read_text())
    assert report["aiohttp"]
    assert len(report["fds"]) == 4


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "killed by SIGKILL"),
        (-60, "killed by signal 60"),
        (3, "exited with code 3"),
        (None, "ended; its exit status is unknown because another supervisor started it"),
    ],
)
def test_a_return_code_is_put_into_words(code: int | None, words: str) -> None:
    assert describe_returncode(code) == words
