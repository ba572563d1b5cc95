"""The command line of QEMU for one machine: few devices, no firmware, no PCI.

Machine type `microvm` with ACPI: the stock kernel finds its virtio-mmio devices by ACPI
(`LNRO0005`), since it has no command-line option for them. Switching the PIT or the RTC off too
hangs a stock kernel under TCG.

It starts sooner than `q35`, which has SeaBIOS and PCI. Measured from QEMU's start to the agent's
handshake, with the same kernel, image and arguments (QEMU 7.2, Linux 6.1, `-accel tcg`, one
processor, 512 MiB, a vsock alone), in 17 boots of each by turns on a busy host of two cores: QEMU
took 4.8 s of processor time against 5.8 s (medians; the least 3.8 and 4.2), and 8.1 s against 8.8 s
by the clock (the least 5.1 and 5.3). Under KVM it was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from voidbus.vm.kernel_line import require_length

MAX_DEVICES = 23
"""The microvm machine with two I/O APICs has 24 virtio-mmio transports (QEMU hw/i386/microvm.c),
but the interrupt of the last one, on pin 0 of the second, reaches no stock kernel (measured: QEMU
7.2, Linux 6.1)."""

# QEMU's own filter of system calls; each refuses what this machine never does.
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_CONFIG_LINE = 1023
"""QEMU reads lines into 1024 bytes, and takes what is beyond for a line of its own (7.2,
util/qemu-config.c)."""

_SETTING = '  append = "{}"\n'

LONGEST_LINE = _CONFIG_LINE - len(_SETTING.format(""))
"""Bytes of a kernel's command line that reach it whole."""


@dataclass(frozen=True)
class VhostUser:
    """A device served by this process, which ``socket`` is connected to. ``properties`` are
    QEMU's for ``driver``."""

    socket: int
    driver: str
    properties: str = ""


@dataclass(frozen=True)
class Card:
    """A network card whose frames go to ``socket``."""

    socket: int
    mac: str
    mtu: int


@dataclass(frozen=True)
class Layout:
    """What one QEMU is made of. It inherits ``descriptors`` and opens no path of ours: it may be
    another user, who may enter no directory of this one."""

    name: str
    program: str
    acceleration: str
    memory_mb: int
    vcpus: int
    kernel: int
    initramfs: int
    monitor: int
    serial: int
    config: int
    vhost_user: tuple[VhostUser, ...]
    disks: tuple[int, ...] = ()
    card: Card | None = None

    @property
    def descriptors(self) -> tuple[int, ...]:
        return (
            *(self.kernel, self.initramfs, self.monitor, self.serial, self.config),
            *(device.socket for device in self.vhost_user),
            *self.disks,
            *(() if self.card is None else (self.card.socket,)),
        )


def config_text(line: str) -> str:
    """A QEMU configuration file with what others on the host must not read in an argument list:
    the kernel's command line carries the secret of the guest channel. Raises ValueError for a line
    QEMU would cut."""
    require_length(line, LONGEST_LINE)
    return f"[machine]\n{_SETTING.format(line)}"


def command(layout: Layout) -> list[str]:
    """The argument list of QEMU."""
    kvm = layout.acceleration == "kvm"
    return [
        layout.program,
        *("-name", f"guest={_quoted(layout.name)}"),
        *(
            "-machine",
            "microvm,acpi=on,x-option-roms=off,memory-backend=memory,dump-guest-core=off",
        ),
        *("-accel", "kvm" if kvm else "tcg,thread=multi"),
        *("-cpu", "host" if kvm else "max"),
        *("-m", f"{layout.memory_mb}M"),
        *("-smp", str(layout.vcpus)),
        *("-object", f"memory-backend-memfd,id=memory,size={layout.memory_mb}M,share=on"),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none"),
        # Virtio 1 only: what a stock kernel prefers, and what a file system device needs.
        *("-global", "virtio-mmio.force-legacy=false"),
        *("-sandbox", _SANDBOX),
        *("-kernel", _opened(layout.kernel), "-initrd", _opened(layout.initramfs)),
        *("-readconfig", _opened(layout.config)),
        *("-chardev", f"socket,id=monitor,fd={layout.monitor}"),
        *("-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=console,fd={layout.serial}"),
        *("-serial", "chardev:console"),
        *_vhost_user_devices(layout.vhost_user),
        *_disks(layout.disks),
        *_card(layout.card),
    ]


def _vhost_user_devices(devices: tuple[VhostUser, ...]) -> list[str]:
    arguments = []
    for number, device in enumerate(devices):
        arguments += ["-chardev", f"socket,id=vhost{number},fd={device.socket}"]
        properties = f",{device.properties}" if device.properties else ""
        arguments += ["-device", f"{device.driver},chardev=vhost{number}{properties}"]
    return arguments


def _disks(disks: tuple[int, ...]) -> list[str]:
    arguments = []
    for number, fd in enumerate(disks):
        drive = (
            f"driver=raw,node-name=disk{number},read-only=on,"
            f"file.driver=file,file.filename=/dev/fdset/{number}"
        )
        arguments += ["-add-fd", f"fd={fd},set={number}", "-blockdev", drive]
        arguments += ["-device", f"virtio-blk-device,drive=disk{number}"]
    return arguments


def _card(card: Card | None) -> list[str]:
    if card is None:
        return []
    return [
        *("-netdev", f"stream,id=net,server=off,addr.type=fd,addr.str={card.socket}"),
        *("-device", f"virtio-net-device,netdev=net,mac={card.mac},host_mtu={card.mtu}"),
    ]


def _opened(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _quoted(text: str) -> str:
    """Text inside a QEMU option, where a comma ends it unless doubled."""
    return text.replace(",", ",,")
