"""A supervisor that `voidbus run` starts for itself, where none runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.runs import ListRuns, RunList
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.cli.connect import JOURNAL, ROOT, Supervisor, open_link
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.output import plain, warn
from voidbus.cli.serving import KEEP
from voidbus.cli.state import SupervisorRecord, find_supervisor

LOG = "supervisor.log"

# Starting takes well under a second here; a busy machine gets this long (seconds).
_START_TIMEOUT = 20.0
# A polite stop with nothing left to do, and what follows where it fails (seconds).
_STOP_TIMEOUT = 20.0
_TERMINATE_TIMEOUT = 10.0
_INTERVAL = 0.02


class OwnSupervisor:
    """The child process, which has a session of its own: a Ctrl-C is not for it."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.log = state / LOG
        # However this process ends, the pipe ends with it, and that is how the child knows.
        theirs, self._leash = os.pipe()
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "voidbus.cli.main",
                        "serve",
                        "--ephemeral",
                        "--state-dir",
                        str(state),
                    ],
                    stdin=theirs,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            os.close(self._leash)
            raise Failure(
                f"cannot start a supervisor on {state}: {error.strerror}: {error.filename}. "
                "Give a directory you can write to: --state-dir DIR",
                ExitCode.NO_SUPERVISOR,
            ) from error
        finally:
            os.close(theirs)

    def keep(self) -> None:
        """Let it go on when this process ends."""
        with contextlib.suppress(OSError):  # it has ended: then there is nothing to keep
            os.write(self._leash, KEEP)

    def close(self) -> None:
        """Give up the pipe: unless it is kept, the supervisor stops."""
        os.close(self._leash)

    def wait_ready(self) -> SupervisorRecord:
        """Wait until a supervisor runs on the state directory: this one, or one that was faster."""
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            record = find_supervisor(self.state)
            if record is not None and record.phase != "starting":
                return record
            ended = self.process.poll()
            if ended is not None and record is None:
                raise Failure(
                    f"the supervisor ended as it started (exit code {ended}): "
                    f"{self._last_words()}. Its log is {self.log}",
                    ExitCode.NO_SUPERVISOR,
                )
            time.sleep(_INTERVAL)
        raise Failure(
            f"the supervisor did not get ready within {_START_TIMEOUT:g} s. See {self.log}",
            ExitCode.NO_SUPERVISOR,
        )

    def stop(self, supervisor: Supervisor, *, failed: bool = False) -> None:
        """Stop it politely, unless others use it by now.

        After a failure a run that goes on is ours: the end of the pipe tells the supervisor to
        stop, which gives the run its time and then cancels it.
        """
        with contextlib.suppress(Failure):
            active = supervisor.ask(JOURNAL, ListRuns(state="active"), RunList)
            if active.total and failed:
                return
            if active.total:
                self.keep()
                warn(
                    f"the supervisor (process {self.process.pid}) goes on, for others started "
                    f"runs on it; stop it with: voidbus stop --state-dir {self.state}"
                )
                return
            supervisor.ask(ROOT, StopSupervisor(runs="cancel", deadline=_STOP_TIMEOUT), Accepted)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_TIMEOUT)
                return
        self.end()

    def end(self) -> None:
        """End it however it takes."""
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(_TERMINATE_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(_TERMINATE_TIMEOUT)

    def _last_words(self) -> str:
        """The last line it wrote."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(self._log_start, self.log.stat().st_size - 4096))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError as error:
            return f"its log can't be read: {error.strerror}"
        return plain(lines[-1]) if lines else "it said nothing"


@contextlib.contextmanager
def some_supervisor(
    state: Path, *, keep: bool
) -> Iterator[tuple[Supervisor, OwnSupervisor | None]]:
    """The supervisor of `state`, after starting one where there is none: then it is the second.

    One that was started is stopped afterwards, unless it is to be kept and all went well.
    """
    supervisor, own = _connect_or_start(state)
    with supervisor, contextlib.closing(own) if own else contextlib.nullcontext():
        try:
            yield supervisor, own
        except KeyboardInterrupt:
            raise  # at once: the end of the pipe tells the supervisor to stop
        except BaseException:
            if own is not None:
                own.stop(supervisor, failed=True)
            raise
        if own is None:
            return
        if keep:
            own.keep()
        else:
            own.stop(supervisor)


def _connect_or_start(state: Path) -> tuple[Supervisor, OwnSupervisor | None]:
    record = find_supervisor(state)
    if record is not None:
        return open_link(record, state, "operate"), None
    own = OwnSupervisor(state)
    try:
        record = own.wait_ready()
        ours = record.pid == own.process.pid
        if ours:
            warn(f"started a supervisor for this run (process {record.pid}, state in {state})")
        else:
            # Somebody else's was faster; ours finds the state directory taken and ends.
            own.end()
        supervisor = open_link(record, state, "operate")
    except BaseException:
        own.end()
        own.close()
        raise
    if ours:
        return supervisor, own
    own.close()
    return supervisor, None
