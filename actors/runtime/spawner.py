"""One way to start processes: by the zygote where it runs, by plain exec where it doesn't."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from voidbus.actors.runtime.exit_watcher import ExitWatcher
from voidbus.actors.runtime.process import (
    ProcessGoneError,
    ProcessHandle,
    ProcessIdentity,
    stat_of,
)
from voidbus.actors.runtime.spawned import (
    OnProcessExit,
    Record,
    SpawnedProcess,
    SpawnError,
    SpawnRequest,
    ZygoteGoneError,
    start_pipes,
)
from voidbus.actors.runtime.zygote import Zygote

_log = logging.getLogger(__name__)

_MODULE = "voidbus.actors.runtime.process_entry"

# After a zygote could not be restarted, exec serves this many seconds before the next try, so
# not every start pays for a start-up that fails.
_RETRY_SECONDS = 30.0


def exec_spawn(
    request: SpawnRequest, watcher: ExitWatcher, on_exit: OnProcessExit, record: Record | None
) -> SpawnedProcess:
    """Start a process by exec; its end is told by `on_exit`, from the watcher's thread.

    Raises OSError if it can't be started or logged, and whatever `record` raises.
    """
    with start_pipes(request, pack_env=False) as pipes:
        passed = (pipes.config_fd, pipes.gate_fd)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, *map(str, passed)],
            stdin=subprocess.DEVNULL,
            stdout=pipes.log_fd,
            stderr=pipes.log_fd,
            env=None if request.env is None else dict(request.env),
            pass_fds=passed,
            start_new_session=True,
        )
        handle: ProcessHandle | None = None
        try:
            # Our own child, not yet reaped: the pid can't have been recycled.
            identity = stat_of(process.pid).identity
            handle = ProcessHandle(identity, os.pidfd_open(process.pid))
            if record is not None:
                record(identity)
            watcher.watch(handle, lambda _: on_exit(identity, _reap(identity.pid)))
        except BaseException:
            process.kill()
            process.wait(5.0)
            if handle is not None:
                handle.close()
            raise
        # From here the watcher reaps it; Popen would warn of a process that outlives its object.
        process.returncode = 0
        pipes.open_gate()
    return SpawnedProcess(identity, handle, "exec")


def _reap(pid: int) -> int | None:
    """The status of our own child, which has ended; None if something else has reaped it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


class Spawner:
    """Starts processes and tells their ends, whichever way they were started.

    It tries the zygote, restarts it once if it is gone, and executes otherwise. `entries`, if
    given, are the only entries it starts. `on_exit` is called once for each process, from one of
    the spawner's threads, maybe before `spawn` has returned; it must be short and must not spawn.
    Its status is None if the zygote that could have told it has died.
    """

    def __init__(
        self,
        *,
        on_exit: OnProcessExit,
        preload: Sequence[str] = (),
        entries: frozenset[str] | None = None,
        use_zygote: bool = True,
        start_timeout: float = 30.0,
    ) -> None:
        self._on_exit = on_exit
        self._preload = tuple(preload)
        self._entries = entries
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._zygote: Zygote | None = None
        self._retry_at = 0.0 if use_zygote else float("inf")
        self._closed = False
        self._watcher = ExitWatcher("spawner-exits")

    def start(self) -> None:
        """Start the zygote now, not at the first `spawn`; if that fails, it is logged."""
        self._ready_zygote(time.monotonic() + self._start_timeout)

    def spawn(
        self,
        entry: str,
        config: bytes,
        *,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        title: str = "voidbus-run",
        record: Record | None = None,
        timeout: float = 30.0,
    ) -> SpawnedProcess:
        """Start a process that calls `entry` ("module:function") with `config`.

        `env` is its whole environment (None: ours); stdout and stderr are appended to `log_path`,
        else dropped. `record` is called with its identity before its entry is.

        Raises ValueError for an entry that isn't allowed or a config that is too large, SpawnError
        or OSError if it can't be started, RuntimeError after `close`, and whatever `record`
        raises.
        """
        if self._entries is not None and entry not in self._entries:
            raise ValueError(f"{entry!r} is not among the entries this spawner may start")
        request = SpawnRequest(entry, config, env, log_path, title)
        half = time.monotonic() + timeout / 2  # the other half is the exec path's
        for _ in range(2):
            zygote = self._ready_zygote(half)
            if zygote is None:
                break
            try:
                return zygote.spawn_request(request, record, max(0.0, half - time.monotonic()))
            except ZygoteGoneError as error:
                _log.warning("%s", error)
            except SpawnError as error:
                _log.warning("%s; %s is executed instead", error, title)
                break
        if self._closed:
            raise RuntimeError("the spawner is closed and starts nothing")
        return exec_spawn(request, self._watcher, self._on_exit, record)

    def close(self, timeout: float = 5.0) -> None:
        """End the zygote and the threads; the processes live on and are no longer reported."""
        self._closed = True
        with self._lock:
            zygote, self._zygote = self._zygote, None
        if zygote is not None:
            zygote.close(timeout)
        self._watcher.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ready_zygote(self, until: float) -> Zygote | None:
        """The running zygote, started if there is none; None if exec has to do."""
        if not self._lock.acquire(timeout=max(0.0, until - time.monotonic())):
            return None
        try:
            if self._zygote is not None and self._zygote.alive:
                return self._zygote
            if self._closed or time.monotonic() < self._retry_at:
                return None
            dead, self._zygote = self._zygote, None
            if dead is not None:
                dead.bury()  # its reader may not have come to its end yet
            zygote = Zygote(self._preload, on_exit=self._on_exit, on_lost=self._watch_lost)
            try:
                zygote.start(max(0.0, until - time.monotonic()))
            except Exception:  # noqa: BLE001 - whatever it is, exec does the job
                _log.warning("the zygote does not start; processes are executed", exc_info=True)
                self._retry_at = time.monotonic() + _RETRY_SECONDS
                return None
            self._zygote = zygote
            return zygote
        finally:
            self._lock.release()

    def _watch_lost(self, identities: Sequence[ProcessIdentity]) -> None:
        """See the ends, without their status, of processes whose zygote has died."""
        for identity in identities:
            try:
                handle = ProcessHandle.adopt(identity)
            except (ProcessGoneError, OSError):
                self._on_exit(identity, None)
                continue
            with handle, contextlib.suppress(RuntimeError):  # closed meanwhile
                self._watcher.watch(handle, lambda gone: self._on_exit(gone.identity, None))
