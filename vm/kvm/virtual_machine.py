"""One machine of KVM: its memory, its interrupt controllers, and what eventfds stand for in it."""

from __future__ import annotations

import ctypes
import os

from voidbus.vm.kvm import calls
from voidbus.vm.kvm.calls import ioctl
from voidbus.vm.kvm.memory import Ram
from voidbus.vm.kvm.structures import (
    KvmEnableCap,
    KvmIoeventfd,
    KvmIrqfd,
    KvmUserspaceMemoryRegion,
)
from voidbus.vm.kvm.system import SPLIT_IRQCHIP, Kvm
from voidbus.vm.kvm.vcpu import Vcpu

IO_APIC_PINS = 24
"""Interrupt lines of KVM's I/O APIC (KVM_IOAPIC_NUM_PINS)."""

# Where KVM on Intel may put four pages of its own: nowhere near memory or devices of ours, below
# 4 GiB as it asks (api.rst, 4.24, 4.41), and where every other monitor has them.
_IDENTITY_MAP = 0xFFFB_C000
_TSS = 0xFFFB_D000

_DATAMATCH = 1 << 0  # KVM_IOEVENTFD_FLAG_DATAMATCH


class VirtualMachine:
    """A machine with its memory. Owns its descriptor; its vCPUs own theirs."""

    def __init__(self, kvm: Kvm, ram: Ram) -> None:
        """``ram`` is the caller's and outlives this. Raises KvmError."""
        self._run_bytes = kvm.run_bytes
        self._fd = kvm.create_vm()
        try:
            # Before there are interrupt controllers: afterwards each takes 7 ms in place of 0.3.
            for number, slot in enumerate(ram.slots):
                region = KvmUserspaceMemoryRegion(
                    slot=number,
                    guest_phys_addr=slot.address,
                    memory_size=slot.size,
                    userspace_addr=slot.host_address,
                )
                ioctl(self._fd, calls.SET_USER_MEMORY_REGION, region)
        except BaseException:
            self.close()
            raise

    def create_interrupt_controllers(self, *, split: bool = False) -> None:
        """Local APICs for the vCPUs to come, an I/O APIC and the two old PICs; ``split`` leaves
        the latter three out. Once, before the first vCPU. Raises KvmError."""
        ioctl(self._fd, calls.SET_TSS_ADDR, _TSS)
        identity = ctypes.c_uint64(_IDENTITY_MAP)
        ioctl(self._fd, calls.SET_IDENTITY_MAP_ADDR, identity)
        if split:
            capability = KvmEnableCap(cap=SPLIT_IRQCHIP)
            capability.args[0] = IO_APIC_PINS
            ioctl(self._fd, calls.ENABLE_CAP, capability)
        else:
            ioctl(self._fd, calls.CREATE_IRQCHIP)

    def create_vcpu(self, number: int) -> Vcpu:
        """vCPU ``number`` (its APIC id), the caller's to close. Raises KvmError, OSError."""
        return Vcpu(ioctl(self._fd, calls.CREATE_VCPU, number), self._run_bytes, number)

    def raise_line_by(self, eventfd: int, line: int) -> None:
        """Each write to ``eventfd`` is an edge on that line of the I/O APIC. Raises KvmError."""
        ioctl(self._fd, calls.IRQFD, KvmIrqfd(fd=eventfd, gsi=line))

    def signal_writes(self, eventfd: int, address: int, value: int) -> None:
        """The guest's writes of the 32 bits ``value`` to ``address`` signal ``eventfd`` and cause
        no exit. Raises KvmError."""
        request = KvmIoeventfd(datamatch=value, addr=address, len=4, fd=eventfd, flags=_DATAMATCH)
        ioctl(self._fd, calls.IOEVENTFD, request)

    def close(self) -> None:
        """Close the descriptor; the machine is gone when its vCPUs are closed too. Again is
        fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
