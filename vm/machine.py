"""What every machine backend is: start a guest, give its channel, stop it, leave nothing."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from voidbus.vm.channel import GuestChannel


@dataclass(frozen=True)
class Forward:
    """A port in the guest that leads to one endpoint on the host: a port of 127.0.0.1 or the
    path of a Unix socket. ``guest_port`` 0 lets the guest choose (see
    ``GuestChannel.forwards`` for what it chose)."""

    guest_port: int
    host: tuple[str, int] | Path


@dataclass(frozen=True)
class Mount:
    """A directory of the host that the guest sees at ``guest_path``. One that is ``writable`` is
    made where it is missing."""

    host_path: Path
    guest_path: str
    writable: bool = False


@dataclass(frozen=True)
class ImageMount:
    """A local OCI image (see ``unpack_image``) whose files the guest has below ``guest_path``."""

    reference: str
    guest_path: str


@dataclass(frozen=True)
class MachineSpec:
    """What to run. ``scratch`` is an existing directory that belongs to this machine alone;
    ``secret`` is 32 bytes; ``allowed_commands`` None allows everything. ``kernel`` and
    ``initramfs`` replace the image's own; ``root`` is a local OCI image (see ``unpack_image``)
    whose file system the programs get; ``host_ports`` are ports of the host's 127.0.0.1 that a
    guest with ``network`` may reach at its gateway; ``agent`` names the agent whose layer (see
    ``agent_layer``) lies over that root, and ``images`` lie over both; ``kernel_vsock`` has the
    host's kernel serve the guest's sockets, and ``virtiofsd``, a program, serves its directories,
    where the machine can (KVM's)."""

    run_id: str
    name: str
    scratch: Path
    secret: bytes = field(repr=False)
    memory_mb: int = 512
    vcpus: int = 1
    network: bool = False
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    allowed_commands: tuple[str, ...] | None = None
    mounts: tuple[Mount, ...] = ()
    forwards: tuple[Forward, ...] = ()
    kernel: Path | None = None
    initramfs: Path | None = None
    root: str | None = None
    host_ports: frozenset[int] = frozenset()
    agent: str | None = None
    images: tuple[ImageMount, ...] = ()
    kernel_vsock: bool = False
    virtiofsd: Path | None = None


@dataclass(frozen=True)
class Lease:
    """Something that must be reaped when the owner dies without closing the machine: a
    process, told from a later one of the same pid by its start time (clock ticks since boot,
    field 22 of proc_pid_stat(5)), or a path."""

    kind: Literal["process", "path"]
    pid: int | None = None
    start_time: int | None = None
    path: Path | None = None


@dataclass(frozen=True)
class MachineExit:
    """Why the machine is no longer there; ``exit_code`` as a shell counts, if there is one."""

    reason: str
    exit_code: int | None


class StopStep(enum.StrEnum):
    """What it took to stop a machine."""

    SHUTDOWN = "shutdown"
    TERMINATED = "terminated"
    KILLED = "killed"
    ALREADY_GONE = "already_gone"


class MachineError(Exception):
    """A machine could not do what was asked: what, to which machine, and what to do."""


class Machine(ABC):
    """One guest. ``on_exit`` is called once, on a thread of the machine, when a started guest
    has ended for whatever reason and its processes are gone; ``on_lease`` as soon as there is
    something to reap. Both must be quick and must not call the machine."""

    name: ClassVar[str]
    isolation: ClassVar[str]

    def __init__(
        self,
        spec: MachineSpec,
        *,
        on_exit: Callable[[MachineExit], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        self.spec = spec
        self.warnings: tuple[str, ...] = ()
        """What the guest could not do at its boot and goes on without, in its own words."""
        self._on_exit = on_exit
        self._on_lease = on_lease

    @abstractmethod
    def start(self, timeout: float) -> GuestChannel:
        """Start the guest and shake hands, within ``timeout`` seconds. The channel belongs to
        the machine: ``close`` closes it. Once only.

        Raises MachineError, with the last console lines; "stopped" when ``stop`` or ``kill``
        was called meanwhile.
        """

    @abstractmethod
    def reconnect(self, timeout: float) -> GuestChannel:
        """A new channel in place of one that died. Raises MachineError."""

    @abstractmethod
    def stop(self, grace: float) -> StopStep:
        """Stop the guest: asked, then told, then killed, within ``grace`` seconds and a small
        constant. May be called by any thread, again, and while ``start`` is under way."""

    @abstractmethod
    def kill(self) -> None:
        """End the guest at once. Returns when it is told, not when it is gone."""

    def offer_host_port(self, port: int) -> str | None:
        """Let the guest reach TCP ``port`` of the host's 127.0.0.1 through its network card; the
        address it has for the guest, or None for a machine without a card."""
        return None

    @abstractmethod
    def console(self) -> bytes:
        """The last of what the guest wrote to its console (64 KiB at most)."""

    @abstractmethod
    def close(self) -> None:
        """Kill what still runs and release every descriptor, thread and process. Again is fine."""
