"""A micro-VM in this process: vCPUs of `/dev/kvm`, and devices of our own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable
from typing import ClassVar

from voidbus.vm.agent_machine import KILL_SECONDS
from voidbus.vm.boot_image import boot_image
from voidbus.vm.devices.bus import Bus
from voidbus.vm.devices.serial_port import PORTS as SERIAL_PORTS
from voidbus.vm.devices.serial_port import SerialPort
from voidbus.vm.devices.shared_directory import MountError
from voidbus.vm.devices.virtio_mmio import QUEUE_NOTIFY
from voidbus.vm.image.guest_image import GIVEN
from voidbus.vm.image.store import GuestImage, ImageError
from voidbus.vm.image_machine import AGENT_PORT, ImageMachine
from voidbus.vm.kvm.acpi_tables import SERIAL_LINE, SERIAL_PORT, SLEEP_CONTROL
from voidbus.vm.kvm.boot_marks import MARKS_ADDRESS, MARKS_BYTES, BootMarks
from voidbus.vm.kvm.calls import KvmError
from voidbus.vm.kvm.ending import Ending, EndKind
from voidbus.vm.kvm.guest_devices import GuestDevices
from voidbus.vm.kvm.loading import load
from voidbus.vm.kvm.memory import Ram
from voidbus.vm.kvm.power_port import PORTS as POWER_PORTS
from voidbus.vm.kvm.power_port import PowerPort
from voidbus.vm.kvm.processor import MOST_VCPUS, enter_kernel, set_up
from voidbus.vm.kvm.system import MAX_VCPUS, Kvm, KvmUnavailable
from voidbus.vm.kvm.vcpu import Vcpu
from voidbus.vm.kvm.vcpu_threads import VcpuThreads
from voidbus.vm.kvm.virtual_machine import VirtualMachine
from voidbus.vm.machine import Lease, MachineError, MachineExit, MachineSpec
from voidbus.vm.network.user_network import NetworkError

log = logging.getLogger(__name__)

_REFUSALS = (ImageError, MountError, NetworkError, KvmUnavailable, KvmError, ValueError)
"""What ends a start with words of its own."""


class KvmMachine(ImageMachine):
    """One machine of KVM. All of it is this process's, and ends with it."""

    name: ClassVar[str] = "kvm"
    isolation: ClassVar[str] = "vm"

    # A connection waits in the device until the driver is up; so nothing is gained by giving one
    # up.
    pong_wait = (10.0, 10.0)

    def __init__(
        self,
        spec: MachineSpec,
        *,
        on_exit: Callable[[MachineExit], None],
        on_lease: Callable[[Lease], None],
    ) -> None:
        super().__init__(spec, on_exit=on_exit, on_lease=on_lease)
        self._open = contextlib.ExitStack()
        self._devices: GuestDevices | None = None
        self._threads: VcpuThreads | None = None
        self._broken: Ending | None = None
        self._ending: Ending | None = None
        self._ports = Bus()
        self._mmio = Bus()
        self._marks = BootMarks()

    @property
    def exits(self) -> Counter[str]:
        """How often the guest came to this process, by what it came for."""
        counted = self._ports.accesses.copy() + self._mmio.accesses.copy()
        return counted if self._threads is None else counted + self._threads.exits.copy()

    @property
    def boot_marks(self) -> dict[str, float]:
        """When (time.monotonic) the kernel was entered, its first program ran ("init") and the
        guest agent answered ("agent"), as far as it has come."""
        return dict(self._marks.moments)

    # -- start -----------------------------------------------------------------------------

    def _launch(self, deadline: float) -> None:
        name = self.spec.name
        try:
            self._build(deadline)
        except _REFUSALS as error:
            raise MachineError(f"machine {name}: {error}") from error
        except OSError as error:
            raise MachineError(
                f"machine {name}: it could not be made: {error}; check the directory "
                f"{self.spec.scratch}"
            ) from error
        self._run()

    def _build(self, deadline: float) -> None:
        """All of the machine, ready to run; what is made is freed by `_release`."""
        spec = self.spec
        image = boot_image(spec)
        kvm = Kvm()
        self._open.callback(kvm.close)
        most = min(kvm.capability(MAX_VCPUS), MOST_VCPUS)
        if spec.vcpus > most:
            raise ValueError(f"{spec.vcpus} processors; set sandbox.vcpus to {most} at most")
        ram = Ram(spec.memory_mb << 20)
        self._open.callback(ram.close)
        devices = GuestDevices(
            *(spec, image, ram.memory, ram.shared), on_failed=self._fail, on_lease=self._on_lease
        )
        self._open.callback(devices.close)
        devices.open(deadline)
        machine = VirtualMachine(kvm, ram)
        self._open.callback(machine.close)
        machine.create_interrupt_controllers()
        vcpus: list[Vcpu] = []
        for number in range(spec.vcpus):
            vcpu = machine.create_vcpu(number)
            self._open.callback(vcpu.close)
            vcpus.append(vcpu)
            set_up(vcpu, kvm, spec.vcpus)
        self._connect_devices(machine, devices)
        enter_kernel(vcpus[0], self._load(ram, image, devices))
        self._devices = devices
        self._threads = VcpuThreads(
            vcpus, ram.memory, self._ports, self._mmio, self._ended, name=spec.name
        )

    def _load(self, ram: Ram, image: GuestImage, devices: GuestDevices) -> int:
        with contextlib.ExitStack() as files:
            opened = []
            for path in (image.kernel, image.initramfs):
                opened.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                files.callback(os.close, opened[-1])
            kernel, initramfs = opened
            line, places = devices.kernel_line, devices.places
            # Files that are not ours may change any moment; and what is mapped for this process
            # alone, virtiofsd does not see: the kernel uses that memory for other things later.
            lasting = image.name != GIVEN and (self.spec.virtiofsd is None or not self.spec.mounts)
            return load(*(ram, kernel, initramfs, line, self.spec.vcpus, places), lasting=lasting)

    def _connect_devices(self, machine: VirtualMachine, devices: GuestDevices) -> None:
        for number, (transport, place) in enumerate(
            zip(devices.transports, devices.places, strict=True)
        ):
            self._mmio.add(place.address, place.size, transport, f"virtio{number}")
            machine.raise_line_by(transport.interrupt_fd, place.line)
            for queue, kick in enumerate(transport.kicks):
                machine.signal_writes(kick, place.address + QUEUE_NOTIFY, queue)
        self._mmio.add(MARKS_ADDRESS, MARKS_BYTES, self._marks, "boot marks")
        eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open.callback(os.close, eventfd)
        machine.raise_line_by(eventfd, SERIAL_LINE)
        serial = SerialPort(self._console.add, eventfd)
        self._ports.add(SERIAL_PORT, SERIAL_PORTS, serial, "serial port")
        self._ports.add(SLEEP_CONTROL, POWER_PORTS, PowerPort(self._turn_off), "power")

    def _run(self) -> None:
        devices, threads = self._devices, self._threads
        assert devices is not None
        assert threads is not None
        try:
            devices.start()
            self._marks.note("kernel")
            threads.start()
        except RuntimeError as error:  # no thread to be had
            raise MachineError(
                f"machine {self.spec.name}: it could not be started: {error}; end other programs"
            ) from error
        if self._broken is not None:
            threads.stop(self._broken)
        if self._stopping.is_set():
            threads.stop()

    def _connect(self) -> socket.socket:
        if self._devices is None or self._gone.is_set():
            raise ConnectionError("the machine does not run")
        return self._devices.connect(AGENT_PORT)

    def offer_host_port(self, port: int) -> str | None:
        return None if self._devices is None else self._devices.offer_host_port(port)

    def _image_env(self) -> tuple[tuple[str, str], ...]:
        return () if self._devices is None else self._devices.env

    # -- the end, on threads of devices and vCPUs -------------------------------------------

    def _turn_off(self) -> None:
        self._stop_threads(Ending(EndKind.GUEST, "turned off"))

    def _fail(self, reason: str) -> None:
        """A device can't go on; so the machine can't."""
        if self._broken is None:
            self._broken = Ending(EndKind.FAULT, reason)
        self._stop_threads(self._broken)

    def _stop_threads(self, ending: Ending | None = None) -> None:
        if self._threads is not None:
            self._threads.stop(ending)

    def _ended(self, ending: Ending) -> None:
        """No vCPU runs any more. On the last one's thread."""
        self._ending = ending
        self._gone.set()
        fault = ending.kind is EndKind.FAULT
        stopped = self._stopping.is_set() and not fault
        reason = "stopped" if stopped else self._end_reason() or ""
        self._on_exit(MachineExit(reason, 1 if fault else 0))
        # Whoever waits at a connection is to hear of it now, and not when the machine is closed.
        if self._devices is not None:
            self._devices.close()

    def _end_reason(self) -> str | None:
        ending = self._ending
        if ending is None:
            return None
        if ending.kind is EndKind.GUEST:
            return f"the guest has ended: {ending.reason}"
        return ending.reason

    # -- stop ------------------------------------------------------------------------------

    def _terminate(self) -> None:
        self._stop_threads()

    def kill(self) -> None:
        with self._lock:
            self._stopping.set()
        self._stop_threads()

    def _release(self) -> None:
        threads = self._threads
        if threads is not None and not threads.join(KILL_SECONDS):
            if self._devices is not None:
                self._devices.stop()  # a vCPU may wait for one that waits for a disk
            if not threads.join(KILL_SECONDS):
                # What they use can't be taken from under them.
                log.error("machine %s: its vCPUs can't be ended yet", self.spec.name)
                return
        self._open.close()
