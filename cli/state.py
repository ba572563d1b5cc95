"""Where a supervisor keeps its state, and whether one runs there. Cheap to import."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from voidbus.cli.failure import ExitCode, Failure

RECORD = "supervisor.json"
# Where the keys for other machines are, unless the configuration says otherwise.
KEYS_FOLDER = "keys"


@dataclass(frozen=True, slots=True)
class SupervisorRecord:
    """What a supervisor writes of itself into its state directory.

    `start_time` is the process's, in clock ticks since boot (proc_pid_stat(5), field 22): with
    the pid it names a process for good. `sockets` is the directory of its endpoints.
    """

    pid: int
    start_time: int
    version: str
    sockets: str
    phase: str

    @property
    def alive(self) -> bool:
        return process_start_time(self.pid) == self.start_time


@dataclass(frozen=True, slots=True)
class Remote:
    """A supervisor on another machine: one of its addresses, and the file of this client's keys."""

    url: str
    keys: Path

    def __str__(self) -> str:
        return self.url


def default_client_keys() -> Path:
    """Where a client's keys are looked for: $XDG_CONFIG_HOME/voidbus/client.keys."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base.startswith("/") else Path("~/.config").expanduser()
    return folder / "voidbus" / "client.keys"


def state_directory(given: Path | None) -> Path:
    """The state directory: what was given, $VOIDBUS_STATE_DIR, or where the XDG base directory
    specification puts it. Absolute; it need not exist."""
    if given is not None:
        return given.absolute()
    named = os.environ.get("VOIDBUS_STATE_DIR")
    if named:
        return Path(named).absolute()
    # XDG: a relative path is invalid and to be ignored.
    base = os.environ.get("XDG_STATE_HOME", "")
    if base.startswith("/"):
        return Path(base) / "voidbus"
    try:
        return Path.home() / ".local" / "state" / "voidbus"
    except RuntimeError as error:
        raise Failure(
            "this user has no home directory to keep state in; give --state-dir DIR or set "
            "VOIDBUS_STATE_DIR",
            ExitCode.USAGE,
        ) from error


def read_record(state: Path) -> SupervisorRecord | None:
    """What the supervisor of `state` wrote, alive or not. None where there is nothing to read."""
    try:
        found = json.loads((state / RECORD).read_text())
        return SupervisorRecord(
            pid=int(found["pid"]),
            start_time=int(found["start_time"]),
            version=str(found.get("version", "")),
            sockets=str(found["sockets"]),
            phase=str(found.get("phase", "")),
        )
    except PermissionError as error:
        raise Failure(
            f"cannot read {state / RECORD}: it belongs to another user. Run voidbus as that user, "
            "or use another --state-dir",
            ExitCode.NO_SUPERVISOR,
        ) from error
    except (OSError, ValueError, KeyError, TypeError):
        # None written, or one being written: nobody to talk to yet.
        return None


def find_supervisor(state: Path) -> SupervisorRecord | None:
    """The supervisor that runs on `state` now, or None."""
    record = read_record(state)
    return record if record is not None and record.alive else None


def process_start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 where it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # The name before the last ')' may hold anything (proc_pid_stat(5)).
    fields = text[text.rfind(b")") + 2 :].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return 0
    return int(fields[19])
