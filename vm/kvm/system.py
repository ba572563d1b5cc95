"""The host's KVM: what it can do, and the processor it lets guests have."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from voidbus.vm.kvm.calls import (
    CHECK_EXTENSION,
    CREATE_VM,
    GET_API_VERSION,
    GET_SUPPORTED_CPUID,
    GET_VCPU_MMAP_SIZE,
    KvmError,
    ioctl,
)
from voidbus.vm.kvm.structures import CpuidTable

KVM_DEVICE = Path("/dev/kvm")

API_VERSION = 12
"""The only version of the interface there has been since Linux 2.6.22 (api.rst, 4.1)."""

# Capabilities (`linux/kvm.h`, KVM_CAP_...) without which there is no machine.
NEEDED = {
    "IRQCHIP": 0,
    "USER_MEMORY": 3,
    "SET_TSS_ADDR": 4,
    "EXT_CPUID": 7,
    "MP_STATE": 14,
    "IRQFD": 32,
    "IOEVENTFD": 36,
    "SET_IDENTITY_MAP_ADDR": 37,
}
MAX_VCPUS = 66
"""KVM_CAP_MAX_VCPUS: how many vCPUs a machine may have."""
TSC_DEADLINE_TIMER = 72
"""KVM_CAP_TSC_DEADLINE_TIMER: local APICs have that mode, which CPUID may then tell."""
SPLIT_IRQCHIP = 121
"""KVM_CAP_SPLIT_IRQCHIP: only local APICs in the kernel."""


class KvmUnavailable(Exception):
    """There is no KVM to use here: why, and what to do."""


class Kvm:
    """`/dev/kvm`, opened. Owns the descriptor."""

    def __init__(self, device: Path = KVM_DEVICE) -> None:
        """Raises KvmUnavailable: it is not there, may not be opened, or lacks something."""
        try:
            self._fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmUnavailable(
                f"{device} can't be opened: {error.strerror}; load the module kvm_intel or "
                "kvm_amd, and see that this user may open it (group kvm)"
            ) from error
        try:
            self._check(device)
        except BaseException:
            self.close()
            raise

    def _check(self, device: Path) -> None:
        try:
            version = ioctl(self._fd, GET_API_VERSION)
            lacking = [name for name, number in NEEDED.items() if not self.capability(number)]
            self.run_bytes = ioctl(self._fd, GET_VCPU_MMAP_SIZE)
            """The size of what each vCPU shares with this process, in bytes."""
        except KvmError as error:
            raise KvmUnavailable(f"{device} does not answer as KVM: {error}") from error
        if version != API_VERSION:
            raise KvmUnavailable(f"{device} speaks API version {version}, not {API_VERSION}")
        if lacking:
            raise KvmUnavailable(
                f"{device} lacks {', '.join(f'KVM_CAP_{name}' for name in lacking)}; use a newer "
                "kernel on the host"
            )

    def capability(self, number: int) -> int:
        """What KVM says of a capability (KVM_CAP_...); 0 where it is lacking."""
        return ioctl(self._fd, CHECK_EXTENSION, number)

    def supported_cpuid(self) -> CpuidTable:
        """What CPUID may answer at most. Raises KvmError."""
        table = CpuidTable()
        table.nent = len(table.entries)
        ioctl(self._fd, GET_SUPPORTED_CPUID, table)
        return table

    def create_vm(self) -> int:
        """A new machine's descriptor, the caller's. Raises KvmError."""
        return ioctl(self._fd, CREATE_VM)

    def close(self) -> None:
        """Close the descriptor; machines go on. Again is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)
