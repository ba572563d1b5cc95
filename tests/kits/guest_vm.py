"""A real guest for the tests of what runs in it: QEMU, the base image, our socket device."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from voidbus.vm.channel import GuestChannel
from voidbus.vm.connect import Connected, connect_guest
from voidbus.vm.devices.vhost_user_vsock import VhostUserVsock
from voidbus.vm.guest.handshake import EVERYTHING, Flags
from voidbus.vm.image.cpio import regular, write_archive
from voidbus.vm.image.store import GuestImage, default_store
from voidbus.vm.qemu.host_clock import counter_khz

BOOT_SECONDS = 60.0
"""How long a guest may take to answer, under emulation on a busy machine."""

KERNEL_LINE = "console=ttyS0 quiet panic=-1 reboot=t nokaslr ipv6.disable=1"


class GuestVm:
    """One machine. Entering starts QEMU; leaving ends it. ``arguments`` are added to the
    kernel command line, ``disks`` are attached read-only as vda and so on, ``options`` are
    further ones of QEMU."""

    def __init__(
        self,
        arguments: Sequence[str] = (),
        *,
        disks: Sequence[Path] = (),
        options: Sequence[str] = (),
        image: GuestImage | None = None,
        secret_argument: bool = True,
        memory_mb: int = 512,
    ) -> None:
        self.secret = secrets.token_bytes(32)
        self.image = image or default_store().current()
        self._folder = tempfile.TemporaryDirectory(prefix="voidbus-guest-")
        self.folder = Path(self._folder.name)
        if secret_argument:
            arguments = (f"voidbox.secret={self.secret.hex()}", *arguments)
        counter = counter_khz()
        if counter is not None:
            arguments = (f"tsc_early_khz={counter}", "tsc=reliable", *arguments)
        self._line = " ".join((KERNEL_LINE, *arguments))
        self._disks = disks
        self._options = options
        self._memory_mb = memory_mb
        self._channels: list[GuestChannel] = []
        self.failures: list[str] = []
        self.vsock = VhostUserVsock(
            self.folder / "vhost",
            self.folder / "vsock",
            3,
            name="guest",
            on_failed=self.failures.append,
        )
        self.qemu: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> GuestVm:
        self.vsock.start()
        # The secret of a machine of a test may be seen.
        self.qemu = subprocess.Popen(
            self._command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        return self

    def add_share(self, tag: str) -> None:
        """Attach the virtio-fs device that is served at the machine's socket ``tag``."""
        self._options = (
            *self._options,
            *("-chardev", f"socket,id={tag},path={self.folder / tag}"),
            *("-device", f"vhost-user-fs-device,chardev={tag},tag={tag},queue-size=1024"),
        )

    def _command(self) -> list[str]:
        command = [
            "qemu-system-x86_64",
            *("-machine", "microvm,acpi=on,x-option-roms=off,memory-backend=memory"),
            *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1"),
            *("-m", f"{self._memory_mb}M"),
            *("-object", f"memory-backend-memfd,id=memory,size={self._memory_mb}M,share=on"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(self.image.kernel), "-initrd", str(self.image.initramfs)),
            *("-append", self._line),
            *("-serial", f"file:{self.folder / 'console'}"),
            *("-chardev", f"socket,id=vsock,path={self.folder / 'vhost'}"),
            *("-device", "vhost-user-vsock-device,chardev=vsock"),
        ]
        for number, disk in enumerate(self._disks):
            drive = f"driver=raw,node-name=d{number},read-only=on,file.driver=file,file.filename="
            command += ["-blockdev", f"{drive}{disk}"]
            command += ["-device", f"virtio-blk-device,drive=d{number}"]
        return [*command, *self._options]

    def dial(self, timeout: float, flags: Flags = EVERYTHING) -> Connected:
        """An authenticated connection. Raises ChannelFault."""
        return connect_guest(
            lambda: self.vsock.connect(1234),
            self.secret,
            timeout,
            flags=flags,
            pong_wait=(10.0, 10.0),
            given_up=self._given_up,
        )

    def _given_up(self) -> str | None:
        assert self.qemu is not None
        code = self.qemu.poll()
        if self.failures:
            return f"the socket device failed: {self.failures}"
        return None if code is None else f"QEMU ended with {code}; console: {self.console()}"

    def channel(self, flags: Flags = EVERYTHING) -> GuestChannel:
        """A channel to the guest, which may still be booting. Raises ChannelFault."""

        def dial(timeout: float) -> Connected:
            return self.dial(timeout, flags)

        channel = GuestChannel(dial(BOOT_SECONDS), dial=dial)
        self._channels.append(channel)
        return channel

    def console(self) -> str:
        """What the guest has written to its console so far."""
        path = self.folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, timeout: float) -> int:
        """QEMU's exit code, once it ends. Raises subprocess.TimeoutExpired."""
        assert self.qemu is not None
        return self.qemu.wait(timeout)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for channel in self._channels:
            channel.close()
        if self.qemu is not None:
            self.qemu.kill()
            self.qemu.wait(10)
        self.vsock.close()
        self._folder.cleanup()


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition comes true in time; looked at each 50 ms."""
    pause = threading.Event()
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() >= deadline:
            return False
        pause.wait(0.05)
    return True


def with_init(folder: Path, script: str) -> dict[str, Path]:
    """The base image with another /init: a later archive's files replace an earlier one's."""
    image = default_store().current()
    initramfs = folder / "with-init.cpio"
    shutil.copyfile(image.initramfs, initramfs)
    with initramfs.open("ab") as file:
        write_archive([regular("init", script.encode(), 0o755)], file)
    return {"kernel": image.kernel, "initramfs": initramfs}
