"""A supervisor that `voidbus run` starts for itself, where none runs."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

from voidbus.actors.messages.actor import Accepted
from voidbus.actors.messages.runs import ListRuns, RunList
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.cli.connect import JOURNAL, ROOT, Supervisor, open_link
from voidbus.cli.failure import ExitCode, Failure
from voidbus.cli.output import plain, warn
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
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            raise Failure(
                f"cannot start a supervisor on {state}: {error.strerror}: {error.filename}. "
                "Give a directory you can write to: --state-dir DIR",
                ExitCode.NO_SUPERVISOR,
            ) from error

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

    def stop(self, supervisor: Supervisor) -> None:
        """Stop it politely, unless others use it by now."""
        with contextlib.suppress(Failure):
            others = supervisor.ask(JOURNAL, ListRuns(state="active"), RunList)
            if others.total:
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

    def abandon(self) -> None:
        """Tell it to end and don't wait."""
        if self.process.poll() is None:
            self.process.terminate()

    def _last_words(self) -> str:
        """The last line it wrote."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(self._log_start, self.log.stat().st_size - 4096))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError as error:
            return f"its log can't be read: {error.strerror}"
        return plain(lines[-1]) if lines else "it said nothing"


def connect_or_start(state: Path) -> tuple[Supervisor, OwnSupervisor | None]:
    """Connect to the supervisor of `state`, after starting one where there is none.

    The second is the one that was started, for the caller to stop.
    """
    record = find_supervisor(state)
    if record is not None:
        return open_link(record, state, "operate"), None
    own = OwnSupervisor(state)
    try:
        record = own.wait_ready()
        if record.pid != own.process.pid:
            # Somebody else's was faster; ours finds the state directory taken and ends.
            own.end()
            return open_link(record, state, "operate"), None
        warn(f"started a supervisor for this run (process {record.pid}, state in {state})")
        return open_link(record, state, "operate"), own
    except BaseException:
        own.end()
        raise
