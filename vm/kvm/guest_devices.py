"""What a KVM machine has besides processors and memory: vsock, disks, mounts, network; and what its
kernel is told of them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from voidbus.vm.boot_arguments import first_arguments, mount_argument
from voidbus.vm.devices.block import SECTOR, BlockDevice
from voidbus.vm.devices.device import VhostDevice, VirtioDevice
from voidbus.vm.devices.entropy import EntropyDevice
from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.memory import GuestMemory, SharedRegion
from voidbus.vm.devices.network_card import NetworkCard
from voidbus.vm.devices.share_nodes import ShareLimits
from voidbus.vm.devices.shared_directory import SharedDirectory
from voidbus.vm.devices.vhost_user_device import VhostUserDevice
from voidbus.vm.devices.vhost_vsock import VhostVsock
from voidbus.vm.devices.virtio_fs import VirtioFs
from voidbus.vm.devices.virtio_mmio import REGISTERS_BYTES, VirtioMmio
from voidbus.vm.devices.vsock import VsockDevice
from voidbus.vm.devices.vsock_sockets import HostSockets, open_host_port
from voidbus.vm.guest.boot_line import MORE_BYTES
from voidbus.vm.image.guest_image import GIVEN
from voidbus.vm.image.store import GuestImage
from voidbus.vm.kernel_line import kernel_line, require_length
from voidbus.vm.kvm.acpi_tables import MmioDevice
from voidbus.vm.kvm.boot_marks import MARKS_ADDRESS
from voidbus.vm.kvm.loading import LONGEST_LINE
from voidbus.vm.kvm.memory import LOW_END
from voidbus.vm.kvm.virtual_machine import IO_APIC_PINS
from voidbus.vm.machine import Lease, MachineSpec, Mount
from voidbus.vm.network.addresses import GATEWAY, MAC, MTU
from voidbus.vm.network.rules import NetworkRules
from voidbus.vm.network.user_network import UserNetwork
from voidbus.vm.root_disks import disk_name, root_disks
from voidbus.vm.virtiofsd import Virtiofsd, VirtiofsdDevice

GUEST_CID = 3
"""The guest's vsock address: each machine has a vsock of its own, so the first free one does."""

VSOCK_SOCKET = "vsock.sock"
"""Where programs of the host reach the guest's ports, in the machine's directory."""

FIRST_ADDRESS = LOW_END + 0x1000_0000
"""Where the devices' registers begin: above memory, a page each."""
FIRST_LINE = 5
"""Their first interrupt line; the ones below are a PC's timer, keyboard and serial ports."""
MAX_DEVICES = IO_APIC_PINS - FIRST_LINE
"""Devices there are lines for: each has its own, as edges on a shared one get lost."""

NOT_THERE = (
    "pci=off",  # there is none to look for
    "i8042.nokbd",  # nor a keyboard
    "i8042.noaux",
)
"""What the kernel would look for (admin-guide/kernel-parameters.rst)."""

GREETING_SECONDS = 10.0
"""How long virtiofsd may take from its start to its first answer; it takes 5 ms."""

_FINAL = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class TooManyDevices(ValueError):
    """There are no lines for so many."""


class GuestDevices:
    """Opened in order, closed in reverse. ``on_failed`` is called, on a device's thread, when one
    can't go on."""

    def __init__(
        self,
        spec: MachineSpec,
        image: GuestImage,
        memory: GuestMemory,
        regions: Sequence[SharedRegion],
        *,
        on_failed: Callable[[str], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        """``memory`` and ``regions`` are one, are the caller's and outlive this."""
        self._spec = spec
        self._image = image
        self._memory = memory
        self._regions = regions
        self._on_failed = on_failed
        self._on_lease = on_lease
        self._open = contextlib.ExitStack()
        self._loops: list[EventLoop] = []
        self._connect: Callable[[int], socket.socket]
        self._vsock_loop: EventLoop
        self._disk_loop: EventLoop
        self._network: UserNetwork | None = None
        self._here: Path
        self._disks = 0
        self._served_elsewhere: list[VhostUserDevice] = []
        self._arguments: list[str] = []
        self.transports: list[VirtioMmio] = []
        """The devices, in the order of their addresses and lines."""
        self.env: tuple[tuple[str, str], ...] = ()
        """What the image that is the root says of its programs' environment."""

    @property
    def kernel_line(self) -> str:
        """What the kernel is told, the secret among it. Raises ValueError (too long)."""
        line = kernel_line(self._arguments)
        require_length(line, LONGEST_LINE)
        return line

    @property
    def places(self) -> list[MmioDevice]:
        """Where each of ``transports`` is."""
        return [
            MmioDevice(FIRST_ADDRESS + number * REGISTERS_BYTES, REGISTERS_BYTES, line)
            for number, line in enumerate(range(FIRST_LINE, FIRST_LINE + len(self.transports)))
        ]

    def open(self, deadline: float) -> None:
        """Open everything; only what serves the network runs yet. Once. Raises OSError, ValueError,
        ImageError, MountError, NetworkError; ``close`` is due all the same."""
        spec = self._spec
        marks = f"voidbus.marks={MARKS_ADDRESS}"
        self._arguments = [*NOT_THERE, *first_arguments(spec), marks]
        # A path through the opened directory is short, however long the directory's own is.
        folder = os.open(spec.scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._open.callback(os.close, folder)
        self._here = Path(f"/proc/self/fd/{folder}")
        self._add_disks()
        self._add_vsock()
        mounts = [self._add_mount(number, deadline) for number in range(len(spec.mounts))]
        if spec.network:
            self._add_network(deadline)
        self._tell_of_mounts(mounts)
        self._add(EntropyDevice(), self._vsock_loop)
        _ = self.kernel_line  # mounts' paths may be such that no line carries them
        if len(self.transports) > MAX_DEVICES:
            raise TooManyDevices(
                f"{len(self.transports)} devices, but a machine has room for {MAX_DEVICES}; mount "
                "fewer directories"
            )
        self._on_lease(Lease("path", path=spec.scratch / VSOCK_SOCKET))

    def start(self) -> None:
        """Start their threads. Once. Raises RuntimeError."""
        for loop in self._loops:
            loop.start()

    def stop(self) -> None:
        """End their threads. A guest that still runs finds devices that do nothing any more."""
        self._hang_up()
        for loop in self._loops:
            loop.close()

    def _hang_up(self) -> None:
        """Before their loops are ended, which may wait for an answer; and all at once."""
        for device in self._served_elsewhere:
            device.hang_up()

    # -- each kind ------------------------------------------------------------------------

    def _loop(self, name: str) -> EventLoop:
        loop = EventLoop(f"{self._spec.name}-{name}", self._on_failed)
        self._open.callback(loop.close)
        self._loops.append(loop)
        return loop

    def _add(self, device: VirtioDevice | VhostDevice, loop: EventLoop) -> None:
        """Have a device, and close it at the end or where it can't be had."""
        try:
            transport = VirtioMmio(device, self._memory, loop)
        except BaseException:
            device.close()
            raise
        self._open.callback(transport.close)
        transport.attach()
        # Closed in reverse: the loop's end before the transport's, which has no more to lose.
        self._open.callback(loop.close)
        self.transports.append(transport)

    def _add_disks(self) -> None:
        self._disk_loop = self._loop("disks")
        root = root_disks(self._spec, self._image)
        self.env = root.env
        self._arguments += root.arguments
        for disk in root.disks:
            self._add_disk(disk)

    def _add_disk(self, path: Path) -> None:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            device = BlockDevice(file, f"layer{self._disks}")
        except BaseException:
            os.close(file)
            raise
        self._add(device, self._disk_loop)
        self._disks += 1

    def _add_vsock(self) -> None:
        self._vsock_loop = self._loop("vsock")
        if self._spec.kernel_vsock:
            in_kernel = VhostVsock(self._memory)
            self._connect = in_kernel.connect
            self._add(in_kernel, self._vsock_loop)
            return
        path = self._here / VSOCK_SOCKET
        device = VsockDevice(GUEST_CID, functools.partial(open_host_port, path))
        self._connect = functools.partial(self._connect_here, device)
        self._add(device, self._vsock_loop)
        HostSockets(path, device.connect).listen(self._vsock_loop)

    def _connect_here(self, device: VsockDevice, port: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        if not self._vsock_loop.call(functools.partial(device.connect, port, theirs)):
            ours.close()
            theirs.close()
            raise ConnectionError(f"{self._spec.name}: the socket device is not running")
        return ours

    def _add_mount(self, number: int, deadline: float) -> str:
        """Share a directory; what the kernel is told of it."""
        mount, tag = self._spec.mounts[number], f"mount{number}"
        if mount.writable:
            mount.host_path.mkdir(parents=True, exist_ok=True)
        loop = self._loop(tag)  # of its own: requests wait for the host's disk
        device = self._share(mount, tag, deadline)
        self._add(device, loop)
        if isinstance(device, VhostUserDevice):
            self._served_elsewhere.append(device)
        return mount_argument(tag, mount)

    def _share(self, mount: Mount, tag: str, deadline: float) -> VirtioDevice | VhostDevice:
        program = self._spec.virtiofsd
        limits = ShareLimits.of_process(len(self._spec.mounts))
        share = SharedDirectory(mount.host_path, writable=mount.writable, limits=limits)
        try:
            # It lets a guest set any bit of a mode: to root's files, that of a set-uid program.
            if program is None or (mount.writable and share.owner[0] == 0):
                return VirtioFs(share, tag)
            owner = share.owner
        except BaseException:
            share.close()
            raise
        share.close()  # which has looked whether it may be shared
        return self._share_elsewhere(program, mount, owner, tag, deadline)

    def _share_elsewhere(
        self, program: Path, mount: Mount, owner: tuple[int, int], tag: str, deadline: float
    ) -> VhostUserDevice:
        virtiofsd = Virtiofsd(program, mount, owner, self._here, tag)
        self._open.callback(virtiofsd.close)
        self._on_lease(virtiofsd.process.lease)
        patience = min(deadline - time.monotonic(), GREETING_SECONDS)
        device = VirtiofsdDevice(virtiofsd, tag, self._memory, self._regions, patience=patience)
        for lease in virtiofsd.process.children():  # the one in its namespaces, which serves
            self._on_lease(lease)
        return device

    def _add_network(self, deadline: float) -> None:
        network = UserNetwork(
            self._here,
            NetworkRules(self._spec.host_ports),
            name=f"{self._spec.name}-net",
            on_failed=self._on_failed,
            on_lease=self._on_lease,
        )
        self._open.callback(network.close)
        network.start(max(0.0, deadline - time.monotonic()))
        self._network = network
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)  # the one that listens is ours, with room for one
            sock.connect(os.fspath(network.socket_path))
            card = NetworkCard(sock, MAC, MTU)
        except BaseException:
            sock.close()
            raise
        self._add(card, self._vsock_loop)
        self._arguments.append("voidbox.network=1")

    def _tell_of_mounts(self, mounts: list[str]) -> None:
        """On the kernel's command line, as the protocol has it. Where they have no room there, a
        guest of ours reads them from a disk; any other gets the error of a line that is too long.
        Raises ValueError."""
        try:
            fits = len(kernel_line([*self._arguments, *mounts])) <= LONGEST_LINE
        except ValueError:  # a path that no line carries
            fits = False
        if fits or self._image.name == GIVEN:
            self._arguments += mounts
            return
        text = " ".join(mounts).encode()
        if len(text) > MORE_BYTES:
            raise ValueError("the guest paths of the mounts are too long; use shorter ones")
        self._arguments.append(f"voidbus.more={disk_name(self._disks)}")
        memory = os.memfd_create("voidbus-more", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.write(memory, text.ljust(-len(text) // SECTOR * -SECTOR, b"\0"))
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _FINAL)
            self._add_disk(Path(f"/proc/self/fd/{memory}"))
        finally:
            os.close(memory)

    # -- the guest's ports ------------------------------------------------------------------

    def connect(self, port: int) -> socket.socket:
        """A stream to a port of the guest, as `VhostUserVsock.connect` gives it. Raises
        OSError."""
        return self._connect(port)

    def offer_host_port(self, port: int) -> str | None:
        """See ``Machine.offer_host_port``."""
        if self._network is None:
            return None
        self._network.allow_host_port(port)
        return str(GATEWAY)

    def close(self) -> None:
        """End their threads and close everything, last first; no vCPU runs any more. Again is
        fine."""
        self._hang_up()
        self._open.close()
