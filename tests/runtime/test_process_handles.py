from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.actors.runtime.exit_watcher import ExitWatcher
from voidbus.actors.runtime.process import (
    ProcessGoneError,
    ProcessHandle,
    ProcessIdentity,
    current_identity,
    descendants,
    identity_of,
    kill_leftover,
    parse_stat,
)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until its stdin is closed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


def end_without_reaping(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


@given(
    name=st.binary(max_size=15).filter(lambda b: b"\0" not in b),
    numbers=st.lists(st.integers(0, 2**63), min_size=49, max_size=49),
)
def test_a_name_with_parentheses_does_not_confuse_the_stat_line(
    name: bytes, numbers: list[int]
) -> None:
    line = b"77 (" + name + b") S " + b" ".join(b"%d" % n for n in numbers) + b"\n"
    stat = parse_stat(line)
    assert stat.identity == ProcessIdentity(77, numbers[18])
    assert (stat.parent, stat.session) == (numbers[0], numbers[2])


@pytest.mark.parametrize("line", [b"", b"1 (x", b"1 )x(", b"1 (x) S 1 2"])
def test_what_is_no_stat_line_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not a /proc"):
        parse_stat(line)


def test_this_process_knows_itself() -> None:
    assert current_identity() == identity_of(os.getpid())


def test_a_zombie_is_gone(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper.pid)
    end_without_reaping(sleeper)
    with pytest.raises(ProcessGoneError):
        identity_of(sleeper.pid)
    with pytest.raises(ProcessGoneError):
        ProcessHandle.adopt(identity)
    assert not kill_leftover(identity)


def test_a_recycled_pid_is_never_adopted(sleeper: subprocess.Popen[bytes]) -> None:
    identity = identity_of(sleeper.pid)
    before = ProcessIdentity(identity.pid, identity.start_time - 1)
    with pytest.raises(ProcessGoneError, match="its pid is now"):
        ProcessHandle.adopt(before)
    assert not kill_leftover(before)
    assert sleeper.poll() is None


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1])
def test_an_impossible_pid_is_gone(pid: int) -> None:
    with pytest.raises(ProcessGoneError):
        ProcessHandle.adopt(ProcessIdentity(pid, 1))


def test_a_handle_signals_and_waits(sleeper: subprocess.Popen[bytes]) -> None:
    with ProcessHandle.adopt(identity_of(sleeper.pid)) as handle:
        assert handle.alive()
        assert not handle.wait(0.001)
        handle.signal(signal.SIGTERM)
        assert handle.wait(10)
        assert not handle.alive()
        assert sleeper.wait(10) == -signal.SIGTERM
        with pytest.raises(ProcessGoneError):
            handle.signal(signal.SIGTERM)
    with pytest.raises(ValueError, match="closed"):
        handle.fileno()


def test_a_leftover_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    assert kill_leftover(identity_of(sleeper.pid))
    assert sleeper.wait(10) == -signal.SIGKILL


def test_descendants_include_orphans_of_the_session() -> None:
    # The inner shell ends, so its background cat becomes an orphan in the outer's session.
    script = "(cat <&3 >/dev/null & echo $!); cat <&3 >/dev/null & echo $!; wait"
    with subprocess.Popen(
        ["sh", "-c", f"exec 3<&0; {script}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        orphan, child = int(shell.stdout.readline()), int(shell.stdout.readline())
        assert {found.pid for found in descendants(shell.pid)} == {orphan, child}
        handles = [ProcessHandle.adopt(found) for found in descendants(shell.pid)]
        shell.stdin.close()
        for handle in handles:
            with handle:
                assert handle.wait(10)


def test_the_watcher_tells_a_death_once_and_joins() -> None:
    told: queue.Queue[ProcessHandle] = queue.Queue()
    fds = len(list(Path("/proc/self/fd").iterdir()))
    with (
        ExitWatcher("watched") as watcher,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process,
        ProcessHandle.adopt(identity_of(process.pid)) as handle,
    ):
        watcher.watch(handle, told.put)
        process.kill()
        assert told.get(timeout=10) is handle
        assert not watcher.unwatch(handle)
        assert told.empty()
    assert "watched" not in {thread.name for thread in threading.enumerate()}
    assert len(list(Path("/proc/self/fd").iterdir())) == fds


def test_a_callback_that_raises_does_not_end_the_watcher(
    sleeper: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    told: queue.Queue[ProcessHandle] = queue.Queue()

    def fail(handle: ProcessHandle) -> None:
        raise SystemExit("no")

    with (
        ExitWatcher() as watcher,
        subprocess.Popen(["true"]) as first,
        ProcessHandle(ProcessIdentity(first.pid, 0), os.pidfd_open(first.pid)) as failing,
        ProcessHandle.adopt(identity_of(sleeper.pid)) as handle,
    ):
        watcher.watch(failing, fail)
        watcher.watch(handle, told.put)
        assert failing.wait(10)
        sleeper.kill()
        assert told.get(timeout=10) is handle
    assert "callback" in caplog.text


def test_an_unwatched_or_closed_handle_is_no_trouble(sleeper: subprocess.Popen[bytes]) -> None:
    told: queue.Queue[ProcessHandle] = queue.Queue()
    watcher = ExitWatcher()
    handle = ProcessHandle.adopt(identity_of(sleeper.pid))
    other = ProcessHandle.adopt(handle.identity)
    watcher.watch(handle, told.put)
    watcher.watch(other, told.put)
    assert watcher.unwatch(handle)
    handle.close()
    other.close()  # the watcher has its own copy
    sleeper.kill()
    assert told.get(timeout=10) is other
    watcher.close()
    watcher.close()
    assert told.empty()
    with pytest.raises(RuntimeError, match="closed"):
        watcher.watch(handle, told.put)


def test_the_watcher_sleeps_while_nothing_happens(sleeper: subprocess.Popen[bytes]) -> None:
    with ExitWatcher("resting") as watcher, ProcessHandle.adopt(identity_of(sleeper.pid)) as handle:
        watcher.watch(handle, lambda _: None)
        thread = next(t for t in threading.enumerate() if t.name == "resting")
        status = Path(f"/proc/self/task/{thread.native_id}/status")

        def switches() -> str:
            with status.open() as file:
                return next(line for line in file if line.startswith("voluntary_ctxt_switches"))

        assert not handle.wait(0.05)  # let it settle
        before = switches()
        assert not handle.wait(0.2)
        assert switches() == before
