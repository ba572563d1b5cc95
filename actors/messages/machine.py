"""Between a run actor and its VM actor. These never leave their process, so bytes stay bytes."""

from __future__ import annotations

from voidbus.transport.message import Message


class StartMachine(Message, tag="machine.start"):
    """Start the machine; `sidecar` is the host's (address, port) the guest is to reach.

    Answered by MachineReady, or a fault with the machine's own words.
    """

    sidecar: tuple[str, int] | None = None
    timeout: float


class MachineReady(Message, tag="machine.ready"):
    """The guest answers. `isolation` says what is between it and the host, `reason` why it is this
    kind of machine; `warnings` are what the guest goes on without; `sidecar_url` is how a program
    in the guest reaches the sidecar, `model_url` the gateway to its model."""

    machine: str
    isolation: str
    reason: str = ""
    warnings: tuple[str, ...] = ()
    sidecar_url: str | None = None
    model_url: str | None = None


class Execute(Message, tag="machine.execute"):
    """Run a program. ExecOutput messages follow, then one ExecEnded."""

    number: int
    program: str
    args: tuple[str, ...]
    env: dict[str, str]
    stdin: bytes = b""
    timeout: int


class ExecOutput(Message, tag="machine.exec_output"):
    """A program wrote something."""

    number: int
    stream: str
    data: bytes


class ExecEnded(Message, tag="machine.exec_ended"):
    """A program has ended, all its output delivered."""

    number: int
    exit_code: int
    error: str | None
    duration_ms: int


class SignalExec(Message, tag="machine.signal_exec"):
    """Send a signal to a program's process group."""

    number: int
    signal: int


class WriteGuestFile(Message, tag="machine.write_file"):
    """Write a file in the guest, with its parents. Answered by Done."""

    path: str
    content: bytes


class ReadGuestFile(Message, tag="machine.read_file"):
    """Read a file in the guest. Answered by GuestFile, or a fault where there is none."""

    path: str


class GuestFile(Message, tag="machine.file"):
    """A file's content."""

    content: bytes


class StoreGuestFile(Message, tag="machine.store_file"):
    """Keep a file of the guest's, of `limit` bytes at most. Answered by GuestFileStored, or
    GuestFileMissing where there is none."""

    path: str
    limit: int


class GuestFileStored(Message, tag="machine.file_stored"):
    """The file is kept: the SHA-256 of its content, its size, and what it is where that is small
    enough to be looked at."""

    digest: str
    size_bytes: int
    media_type: str
    content: bytes | None = None


class GuestFileMissing(Message, tag="machine.file_missing"):
    """There is no such file in the guest."""


class WatchGuestFile(Message, tag="machine.watch_file"):
    """Tell of a file whenever it is complete anew, by GuestFileChanged. Answered by Done."""

    path: str


class GuestFileChanged(Message, tag="machine.file_changed"):
    """A watched file is there, written to its end. Told once for several changes at once."""

    path: str


class StopMachine(Message, tag="machine.stop"):
    """Stop the machine within `grace` seconds. Answered by MachineStopped when it is gone."""

    grace: float


class MachineStopped(Message, tag="machine.stopped"):
    """The machine is gone; `step` says what it took."""

    step: str


class MachineEnded(Message, tag="machine.ended"):
    """The machine ended by itself."""

    reason: str
    console: str = ""


class SidecarReady(Message, tag="machine.sidecar_ready"):
    """The sidecar listens, at this address of the host."""

    address: tuple[str, int]


class SidecarEventNoted(Message, tag="machine.sidecar_event"):
    """The sidecar did something worth a line in the run's events."""

    kind: str
    fields: dict[str, str | int | float | bool | None]
