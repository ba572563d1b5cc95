"""What starting a process gives, needs, and how its end is put into words."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from voidbus.actors.runtime.process import ProcessHandle, ProcessIdentity
from voidbus.actors.runtime.process_entry import StartHeader, check_entry, pack_start

# Told from a thread of the spawner's: who ended, and its status as subprocess gives it (negative
# for a signal), or None when the status can't be known.
OnProcessExit = Callable[[ProcessIdentity, int | None], None]

# Called between the process's creation and its entry, so nothing runs that isn't recorded. If it
# raises, the process ends without having run its entry.
Record = Callable[[ProcessIdentity], None]


class SpawnError(Exception):
    """The process could not be started, and none is left."""


class SpawnTimeoutError(SpawnError):
    """The process was not started in time, and none is left."""


class ZygoteGoneError(SpawnError):
    """The zygote has died or is closed."""


@dataclass(frozen=True, slots=True)
class SpawnedProcess:
    """A started process; the caller closes the handle. `by` is "zygote" or "exec"."""

    identity: ProcessIdentity
    handle: ProcessHandle
    by: str


@dataclass(frozen=True, slots=True)
class SpawnRequest:
    """What to start. `env` is the whole environment (None: this process's own)."""

    entry: str
    config: bytes
    env: Mapping[str, str] | None
    log_path: Path | None
    title: str

    def __post_init__(self) -> None:
        check_entry(self.entry)

    def __repr__(self) -> str:
        return f"<SpawnRequest {self.title!r} {self.entry}>"  # config and env may hold secrets


class StartPipes:
    """The descriptors handed to a new process, and the gate that lets it run."""

    def __init__(self, request: SpawnRequest, *, pack_env: bool) -> None:
        env = (os.environ if request.env is None else request.env) if pack_env else None
        header = StartHeader(request.entry, request.title, env)
        self.config_fd = pack_start(header, request.config)
        self.gate_fd = self._open_fd = self.log_fd = -1
        try:
            self.gate_fd, self._open_fd = os.pipe2(os.O_CLOEXEC)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self.log_fd = os.open(request.log_path or os.devnull, flags, 0o600)
        except BaseException:
            self.close()
            raise

    def open_gate(self) -> None:
        """Let the process run its entry."""
        with contextlib.suppress(BrokenPipeError):  # it has died already; its exit tells that
            os.write(self._open_fd, b"1")

    def close(self) -> None:
        """Close them all; a process still waiting at the gate ends."""
        fds = (self.config_fd, self.gate_fd, self._open_fd, self.log_fd)
        self.config_fd = self.gate_fd = self._open_fd = self.log_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


@contextlib.contextmanager
def start_pipes(request: SpawnRequest, *, pack_env: bool) -> Iterator[StartPipes]:
    pipes = StartPipes(request, pack_env=pack_env)
    try:
        yield pipes
    finally:
        pipes.close()


def describe_returncode(returncode: int | None) -> str:
    """A process's end in words, for operators."""
    if returncode is None:
        return "ended; its exit status is unknown because another supervisor started it"
    if returncode >= 0:
        return f"exited with code {returncode}"
    try:
        return f"killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"killed by signal {-returncode}"
