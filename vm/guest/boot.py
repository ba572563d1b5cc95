"""The boot of a real machine, from the first mount to the network. The order is in docs/guest.md.

What goes wrong on the way is logged and kept for the host; the machine goes on without it. What
it can't go on without raises.
"""

from __future__ import annotations

import os
import socket
import time

from . import layers, mounts
from .boot_line import MORE_BYTES, BootLine, parse_boot_line, with_more, without_secret
from .frames import GUEST_PORT
from .identity import SANDBOX
from .kernel_log import KernelLog
from .modules import Modules

BACKLOG = 16
"""Connections the kernel holds until they are taken. The protocol's 5 is soon full of tries
that an impatient host has given up."""

LISTEN_SECONDS = 6.0
"""How long the port may take to be had (protocol, "Guest agent boot": 30 tries of 0.2 s)."""

FIRST_PROGRAM, AGENT_SERVES = 1, 2
"""Marks of a boot, as the host knows them."""

DIRECTORIES = ("/workspace", "/home/sandbox", "/home/sandbox/.local", "/home/sandbox/.local/bin")

_SETTINGS = (
    ("/proc/sys/kernel/printk_devkmsg", "on"),  # else most of our lines are dropped
    ("/proc/sys/kernel/dmesg_restrict", "1"),  # the kernel's log holds the command line
    ("/proc/sys/kernel/yama/ptrace_scope", "0"),  # protocol, "Guest agent boot"
)


class Boot:
    """A boot under way. ``warnings`` is what went wrong so far, ``blocked`` why no program may
    run, ``foreign`` whether the root is an image's own."""

    def __init__(self) -> None:
        self.log = KernelLog()
        self.line = BootLine()
        self.warnings: list[str] = []
        self.blocked: str | None = None
        self.foreign = False
        self.listener: socket.socket | None = None
        self._modules = Modules()
        self._began = time.monotonic()

    def run(self) -> None:
        """All of it. Raises RuntimeError and OSError."""
        self._mount_kernel_file_systems()
        self._read_boot_line()
        self.mark(FIRST_PROGRAM)
        self._failed(*self._modules.load(needed_modules(self.line, has_pci=_has_pci())))
        self.step("kernel modules loaded")
        # From here on a host that connects waits, rather than trying again.
        self.listener = listen()
        self.step(f"listening on vsock port {GUEST_PORT}")
        self._make_root()
        self._failed(*mounts.make_directories(DIRECTORIES, SANDBOX))
        self._link_claude()
        for share in self.line.shares:
            if not (self.foreign and share.guest_path == self.line.rootfs_path):
                self._failed(*mounts.mount_share(share, SANDBOX))
        self._name_machine()
        self._set_up_network()
        self.step("file systems and network set up")

    def mark(self, mark: int) -> None:
        """Tell a host that wants to know how far the boot has come."""
        if self.line.marks is None:
            return
        import mmap  # few hosts want to know, and loading it takes a moment

        try:
            memory = os.open("/dev/mem", os.O_RDWR | os.O_SYNC | os.O_CLOEXEC)
            try:
                with mmap.mmap(memory, mmap.PAGESIZE, offset=self.line.marks) as page:
                    page[0] = mark
            finally:
                os.close(memory)
        except (OSError, ValueError):
            pass  # a kernel without it boots as well

    def step(self, text: str) -> None:
        """Log something done, with the seconds since the start."""
        self.log.step(f"[{time.monotonic() - self._began:.3f}] {text}")

    def _failed(self, *faults: str) -> None:
        for fault in faults:
            self.warnings.append(fault)
            self.log.fault(fault)

    def _mount_kernel_file_systems(self) -> None:
        faults = mounts.mount_kernel_file_systems()
        for path, value in _SETTINGS:
            if (fault := _write(path, value)) is not None:
                faults.append(fault)
        self.log.open()
        self.step("kernel file systems mounted")
        self._failed(*faults)

    def _read_boot_line(self) -> None:
        """Read the command line, then hide what programs must not know: with the secret they
        could speak to the agent as the host does."""
        text = os.fsdecode(_read("/proc/cmdline"))
        self.line = parse_boot_line(text)
        mounts.cover_file("/proc/cmdline", os.fsencode(without_secret(text)), "/run/cmdline")
        os.chmod("/dev/kmsg", 0o600)  # noqa: PTH101 - pathlib loads slowly
        if self.line.more is not None:
            self._read_more(text, self.line.more)
        self._failed(*self.line.faults)
        if self.line.clock is not None and (fault := set_clock(self.line.clock)) is not None:
            self._failed(fault)

    def _read_more(self, text: str, device: str) -> None:
        """Read the keys there was no room for on the command line."""
        from .block_device import read_start

        self._failed(*self._modules.load(("virtio_mmio", "virtio_pci", "virtio_blk")))
        try:
            self.line = parse_boot_line(with_more(text, read_start(device, MORE_BYTES)))
        except OSError as error:
            self._failed(f"voidbus.more={device}: {error.strerror}")

    def _make_root(self) -> None:
        line = self.line
        if line.rootfs_device is None and line.rootfs_path is None and not line.layers:
            return
        if line.rootfs_device is not None or line.rootfs_path is not None:
            # While the initramfs is still the root, because its files move.
            from . import agent as _  # noqa: F401
            from . import foreign
        try:
            self.foreign = layers.replace_root(line, self._modules)
        except layers.RootError as error:
            self._failed(str(error))
            # What runs in another root than the one asked for is not what was asked for.
            self.blocked = f"nothing may run here: {error}"
            return
        if self.foreign:
            self._failed(*foreign.settle())
        self.step("root file system replaced")

    def _link_claude(self) -> None:
        """The link of the protocol ("Guest agent boot"), where there is something to link."""
        path = "/home/sandbox/.local/bin/claude"
        if os.path.exists("/usr/local/bin/claude-code") and not os.path.lexists(path):  # noqa: PTH110
            try:
                os.symlink("/usr/local/bin/claude-code", path)  # noqa: PTH211
            except OSError as error:
                self._failed(f"link {path}: {error.strerror}")

    def _name_machine(self) -> None:
        name = self.line.hostname
        if name is None:
            return
        try:
            socket.sethostname(name)
            _replace_file("/etc/hostname", f"{name}\n")
            _replace_file("/etc/hosts", f"127.0.0.1\tlocalhost {name}\n::1\tlocalhost\n")
        except OSError as error:
            self._failed(f"hostname {name}: {error.strerror}")

    def _set_up_network(self) -> None:
        from . import network

        try:
            network.bring_up("lo")
            _write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")
        except OSError as error:
            self._failed(f"loopback: {error.strerror}")
        settings = self.line.network
        if settings is None:
            return
        try:
            network.set_up(settings)
            if settings.dns:
                _replace_file("/etc/resolv.conf", network.resolver_file(settings))
        except OSError as error:
            self._failed(f"network: {network.INTERFACE}: {error.strerror}")


def needed_modules(line: BootLine, *, has_pci: bool) -> list[str]:
    """The kernel modules a machine with this boot line needs, by name."""
    names = ["virtio_mmio"]
    if has_pci:
        names.append("virtio_pci")
    names.append("vmw_vsock_virtio_transport")
    if line.layers or line.rootfs_device is not None:
        names.append("virtio_blk")
    if line.shares:
        names += ["virtiofs", "9pnet_virtio", "9p"]
    if line.network is not None:
        names.append("virtio_net")
    return names


def listen() -> socket.socket:
    """Listen for the host. Raises RuntimeError when the port is not to be had."""
    deadline = time.monotonic() + LISTEN_SECONDS
    while True:
        try:
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            try:
                listener.bind((socket.VMADDR_CID_ANY, GUEST_PORT))
                listener.listen(BACKLOG)
                listener.setblocking(False)
            except OSError:
                listener.close()
                raise
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RuntimeError(f"no vsock port {GUEST_PORT}: {error.strerror}") from error
            time.sleep(0.05)
        else:
            return listener


def set_clock(seconds: float) -> str | None:
    """Set the time of day, in seconds since 1970; why that failed, or None."""
    try:
        time.clock_settime(time.CLOCK_REALTIME, seconds)
    except OSError as error:
        return f"clock: {error.strerror}"
    return None


def _has_pci() -> bool:
    try:
        return bool(os.listdir("/sys/bus/pci/devices"))  # noqa: PTH208 - pathlib loads slowly
    except OSError:
        return False


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)


def _write(path: str, value: str) -> str | None:
    """Write a kernel setting; why that failed, or None. One that this kernel lacks is left."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: {error.strerror}"
    try:
        os.write(fd, f"{value}\n".encode())
    except OSError as error:
        return f"{path}: {error.strerror}"
    finally:
        os.close(fd)
    return None


def _replace_file(path: str, text: str) -> None:
    folder, _, name = path.rpartition("/")
    with mounts.place(folder) as fd:
        mounts.replace_file(fd, name, text.encode(), 0o644)
