"""What one QEMU machine consists of besides QEMU: image, vsock, mounts, network."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from voidbus.vm.acceleration import find_acceleration
from voidbus.vm.boot_arguments import first_arguments, mount_argument
from voidbus.vm.boot_image import boot_image
from voidbus.vm.devices.share_nodes import ShareLimits
from voidbus.vm.devices.vhost_user_fs import MountError, VhostUserFs
from voidbus.vm.devices.vhost_user_vsock import VhostUserVsock
from voidbus.vm.guest.boot_line import MORE_BYTES
from voidbus.vm.image.guest_image import GIVEN
from voidbus.vm.image.store import GuestImage, ImageError
from voidbus.vm.kernel_line import kernel_line
from voidbus.vm.machine import Lease, MachineError, MachineSpec
from voidbus.vm.network.addresses import GATEWAY, MAC, MTU
from voidbus.vm.network.rules import NetworkRules
from voidbus.vm.network.user_network import NetworkError, UserNetwork
from voidbus.vm.qemu.command import (
    LONGEST_LINE,
    MAX_DEVICES,
    Card,
    Layout,
    VhostUser,
    config_text,
)
from voidbus.vm.qemu.host_clock import counter_khz
from voidbus.vm.qemu.user import qemu_user, readable
from voidbus.vm.root_disks import disk_name, root_disks

GUEST_CID = 3
"""The guest's vsock address: each machine has a vsock of its own, so the first free one does."""

VSOCK_SOCKET = "vsock.sock"
"""Where programs of the host reach the guest's ports, in the machine's directory."""

_VHOST_VSOCK = "vsock.vhost"
# The largest queue of QEMU's device: with its default of 128 a request holds 496 KiB at most.
_FS_QUEUE = "queue-size=1024"
_SECTOR = 512
_FINAL = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Console(NamedTuple):
    """Our ends of QEMU's control connection and of the machine's serial port."""

    monitor: socket.socket
    serial: socket.socket


class Devices:
    """Started in order, closed in reverse. ``on_failed`` is called, on a device's thread, when
    one can't go on.

    What QEMU inherits is opened here too; ``layout`` tells of it, and whoever started QEMU closes
    it with ``handed``."""

    def __init__(
        self,
        spec: MachineSpec,
        *,
        on_failed: Callable[[str], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        self._spec = spec
        self._on_failed = on_failed
        self._on_lease = on_lease
        self._open = contextlib.ExitStack()
        self._vsock: VhostUserVsock | None = None
        self._network: UserNetwork | None = None
        self._image: GuestImage
        self._arguments: list[str] = []
        self._mount_arguments: list[str] = []
        self.acceleration = find_acceleration().name
        self._vhost_user: list[VhostUser] = []
        self._disks: list[int] = []
        self._card: Card | None = None
        self._handed = contextlib.ExitStack()
        self.user = qemu_user(self.acceleration)
        """Whom QEMU is to be, if not this process's user."""
        self.env: tuple[tuple[str, str], ...] = ()
        """What the image that is the root says of its programs' environment."""

    @property
    def kernel_line(self) -> str:
        """What the kernel is told, the secret among it."""
        return kernel_line(self._arguments)

    def start(self, deadline: float) -> None:
        """Start everything QEMU connects to. Raises MachineError; `close` frees what started."""
        name = self._spec.name
        try:
            self._prepare(deadline)
            config_text(self.kernel_line)  # mounts' paths may be such that no line carries them
        except (ImageError, MountError, NetworkError, ValueError) as error:
            raise MachineError(f"machine {name}: {error}") from error
        except OSError as error:
            raise MachineError(
                f"machine {name}: its devices could not be started: {error}; "
                f"check the directory {self._spec.scratch}"
            ) from error
        count = len(self._vhost_user) + len(self._disks) + (self._card is not None)
        if count > MAX_DEVICES:
            raise MachineError(
                f"machine {name}: {count} devices, but a machine has room for {MAX_DEVICES}; "
                "mount fewer directories"
            )

    def _prepare(self, deadline: float) -> None:
        spec = self._spec
        self._image = boot_image(spec)
        # A path through the opened directory is short, however long the directory's own is.
        folder = os.open(spec.scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open.callback(os.close, folder)
        here = Path(f"/proc/self/fd/{folder}")
        self._arguments = first_arguments(spec)
        self._add_clock()
        self._add_disks()
        self._add_vsock(here)
        for number in range(len(spec.mounts)):
            self._add_mount(here, number)
        if spec.network:
            self._add_network(here, deadline)
        self._tell_of_mounts()

    def _add_clock(self) -> None:
        """An emulated guest is told what it can't measure; KVM has a clock of its own for it."""
        khz = counter_khz() if self.acceleration == "tcg" else None
        if khz is not None:
            self._arguments += [f"tsc_early_khz={khz}", "tsc=reliable"]

    def _add_disks(self) -> None:
        root = root_disks(self._spec, self._image)
        self.env = root.env
        self._arguments += root.arguments
        for disk in root.disks:
            self._add_disk(disk)

    def _add_vsock(self, here: Path) -> None:
        vsock = VhostUserVsock(
            here / _VHOST_VSOCK,
            here / VSOCK_SOCKET,
            GUEST_CID,
            name=f"{self._spec.name}-vsock",
            on_failed=self._on_failed,
        )
        self._open.callback(vsock.close)
        vsock.start()
        self._vsock = vsock
        self._add_served(here / _VHOST_VSOCK, "vhost-user-vsock-device")

    def _add_served(self, path: Path, driver: str, properties: str = "") -> None:
        self._vhost_user.append(VhostUser(self._connected(path), driver, properties))

    def _connected(self, path: Path) -> int:
        """QEMU's end of a connection to one of our sockets."""
        sock = socket.socket(socket.AF_UNIX)
        self._handed.callback(sock.close)
        sock.setblocking(False)  # the one that listens is ours, with room for one
        sock.connect(os.fspath(path))
        sock.setblocking(True)
        return sock.fileno()

    def _add_mount(self, here: Path, number: int) -> None:
        mount = self._spec.mounts[number]
        name, tag = f"mount{number}.vhost", f"mount{number}"
        if mount.writable:
            mount.host_path.mkdir(parents=True, exist_ok=True)
        share = VhostUserFs(
            here / name,
            mount.host_path,
            tag,
            writable=mount.writable,
            limits=ShareLimits.of_process(len(self._spec.mounts)),
            name=f"{self._spec.name}-{tag}",
            on_failed=self._on_failed,
        )
        self._open.callback(share.close)
        share.start()
        self._add_served(here / name, "vhost-user-fs-device", f"tag={tag},{_FS_QUEUE}")
        self._mount_arguments.append(mount_argument(tag, mount))

    def _tell_of_mounts(self) -> None:
        """On the kernel's command line, as the protocol has it. Where they have no room there, a
        guest of ours reads them from a disk; any other gets the error of a line that is too long.
        Raises ValueError."""
        together = kernel_line([*self._arguments, *self._mount_arguments])
        if len(together) <= LONGEST_LINE or self._image.name == GIVEN:
            self._arguments += self._mount_arguments
            return
        text = " ".join(self._mount_arguments).encode()
        if len(text) > MORE_BYTES:
            raise ValueError("the guest paths of the mounts are too long; use shorter ones")
        self._arguments.append(f"voidbus.more={disk_name(len(self._disks))}")
        with contextlib.ExitStack() as stack:
            memory = os.memfd_create("voidbus-more", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            stack.callback(os.close, memory)
            os.write(memory, text.ljust(-len(text) // _SECTOR * -_SECTOR, b"\0"))
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _FINAL)
            self._add_disk(Path(f"/proc/self/fd/{memory}"))

    def _add_disk(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._handed.callback(os.close, fd)
        self._disks.append(fd)

    def _add_network(self, here: Path, deadline: float) -> None:
        network = UserNetwork(
            here,
            NetworkRules(self._spec.host_ports),
            name=f"{self._spec.name}-net",
            on_failed=self._on_failed,
            on_lease=self._on_lease,
        )
        self._open.callback(network.close)
        network.start(max(0.0, deadline - time.monotonic()))
        self._network = network
        self._card = Card(self._connected(network.socket_path), MAC, MTU)
        self._arguments.append("voidbox.network=1")

    def layout(self, program: str, kernel_words: str = "") -> tuple[Layout, Console]:
        """What QEMU is made of, with our ends of its monitor and its console, which are the
        caller's. ``kernel_words`` come after everything else the kernel is told. Once. Raises
        OSError, ValueError."""
        with contextlib.ExitStack() as ours:
            monitor, monitor_in = self._pair(ours)
            serial, serial_in = self._pair(ours)
            config = os.memfd_create("voidbus-qemu")
            self._handed.callback(os.close, config)
            os.write(config, config_text(self.kernel_line + kernel_words).encode())
            files = []
            for path in (self._image.kernel, self._image.initramfs):
                files.append(readable(path, self.user))
                self._handed.callback(os.close, files[-1])
            ours.pop_all()
        layout = Layout(
            name=self._spec.run_id,
            program=program,
            acceleration=self.acceleration,
            memory_mb=self._spec.memory_mb,
            vcpus=self._spec.vcpus,
            kernel=files[0],
            initramfs=files[1],
            monitor=monitor_in,
            serial=serial_in,
            config=config,
            vhost_user=tuple(self._vhost_user),
            disks=tuple(self._disks),
            card=self._card,
        )
        return layout, Console(monitor, serial)

    def _pair(self, ours: contextlib.ExitStack) -> tuple[socket.socket, int]:
        mine, theirs = socket.socketpair()
        ours.callback(mine.close)
        self._handed.callback(theirs.close)
        return mine, theirs.fileno()

    def handed(self) -> None:
        """QEMU has been started, or never will be: close what it inherits. Again is fine."""
        self._handed.close()

    def connect(self, port: int) -> socket.socket:
        """A stream to a port of the guest. Raises OSError."""
        if self._vsock is None:
            raise ConnectionError("the machine has no vsock yet")
        return self._vsock.connect(port)

    def offer_host_port(self, port: int) -> str | None:
        """See ``Machine.offer_host_port``."""
        if self._network is None:
            return None
        self._network.allow_host_port(port)
        return str(GATEWAY)

    def close(self) -> None:
        """Close everything, last first. Again is fine."""
        self._handed.close()
        self._open.close()
