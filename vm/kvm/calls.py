"""The calls of the KVM interface that are used here, and what it means when one fails.

Numbers are built as the kernel's `asm-generic/ioctl.h` does; the sections are those of
`Documentation/virt/kvm/api.rst`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass

from voidbus.vm.kvm import structures as s

_KVMIO = 0xAE
_WRITE, _READ = 1, 2  # as seen from this process


@dataclass(frozen=True)
class Call:
    """An ioctl: its name in `linux/kvm.h`, its number, and what it does, for messages."""

    name: str
    number: int
    purpose: str


def _call(name: str, number: int, purpose: str, *, size: int = 0, way: int = 0) -> Call:
    return Call(name, way << 30 | size << 16 | _KVMIO << 8 | number, purpose)


def _takes(name: str, number: int, structure: type[ctypes.Structure], purpose: str) -> Call:
    return _call(name, number, purpose, size=ctypes.sizeof(structure), way=_WRITE)


def _gives(name: str, number: int, structure: type[ctypes.Structure], purpose: str) -> Call:
    return _call(name, number, purpose, size=ctypes.sizeof(structure), way=_READ)


# Of /dev/kvm itself: 4.1 to 4.5, 4.46.
GET_API_VERSION = _call("KVM_GET_API_VERSION", 0x00, "ask for the version of the interface")
CREATE_VM = _call("KVM_CREATE_VM", 0x01, "make a virtual machine")
CHECK_EXTENSION = _call("KVM_CHECK_EXTENSION", 0x03, "ask for a capability")
GET_VCPU_MMAP_SIZE = _call("KVM_GET_VCPU_MMAP_SIZE", 0x04, "ask for the size of kvm_run")
# `struct kvm_cpuid2` and the two below end in an array that does not count.
GET_SUPPORTED_CPUID = _call(
    "KVM_GET_SUPPORTED_CPUID", 0x05, "ask what processor guests may have", size=8, way=3
)

# Of a machine: 4.7, 4.24, 4.35, 4.37, 4.41, 4.55, 4.59, 4.71, 4.75.
CREATE_VCPU = _call("KVM_CREATE_VCPU", 0x41, "make a vCPU")
SET_USER_MEMORY_REGION = _takes(
    "KVM_SET_USER_MEMORY_REGION", 0x46, s.KvmUserspaceMemoryRegion, "give the guest memory"
)
SET_TSS_ADDR = _call("KVM_SET_TSS_ADDR", 0x47, "place three pages KVM needs on Intel")
SET_IDENTITY_MAP_ADDR = _call(
    "KVM_SET_IDENTITY_MAP_ADDR", 0x48, "place a page KVM needs on Intel", size=8, way=_WRITE
)
CREATE_IRQCHIP = _call("KVM_CREATE_IRQCHIP", 0x60, "make the interrupt controllers")
IRQFD = _takes("KVM_IRQFD", 0x76, s.KvmIrqfd, "let an eventfd raise an interrupt")
CREATE_PIT2 = _takes("KVM_CREATE_PIT2", 0x77, s.KvmPitConfig, "make the interval timer")
IOEVENTFD = _takes("KVM_IOEVENTFD", 0x79, s.KvmIoeventfd, "let a write signal an eventfd")
ENABLE_CAP = _takes("KVM_ENABLE_CAP", 0xA3, s.KvmEnableCap, "switch a capability on")

# Of a vCPU: 4.10 to 4.15, 4.19, 4.21 to 4.23, 4.38, 4.39, 4.57, 4.58, 4.47.
RUN = _call("KVM_RUN", 0x80, "run the guest")
GET_REGS = _gives("KVM_GET_REGS", 0x81, s.KvmRegs, "read the registers")
SET_REGS = _takes("KVM_SET_REGS", 0x82, s.KvmRegs, "set the registers")
GET_SREGS = _gives("KVM_GET_SREGS", 0x83, s.KvmSregs, "read the system registers")
SET_SREGS = _takes("KVM_SET_SREGS", 0x84, s.KvmSregs, "set the system registers")
TRANSLATE = _call(
    "KVM_TRANSLATE",
    0x85,
    "translate an address",
    size=ctypes.sizeof(s.KvmTranslation),
    way=_READ | _WRITE,
)
SET_MSRS = _call("KVM_SET_MSRS", 0x89, "set model specific registers", size=8, way=_WRITE)
SET_SIGNAL_MASK = _call(
    "KVM_SET_SIGNAL_MASK", 0x8B, "say which signals interrupt the guest", size=4, way=_WRITE
)
SET_FPU = _takes("KVM_SET_FPU", 0x8D, s.KvmFpu, "set the floating point unit")
GET_LAPIC = _gives("KVM_GET_LAPIC", 0x8E, s.KvmLapicState, "read the local APIC")
SET_LAPIC = _takes("KVM_SET_LAPIC", 0x8F, s.KvmLapicState, "set the local APIC")
SET_CPUID2 = _call("KVM_SET_CPUID2", 0x90, "say what CPUID answers", size=8, way=_WRITE)
GET_MP_STATE = _gives("KVM_GET_MP_STATE", 0x98, s.KvmMpState, "ask whether a vCPU runs")

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Call))

_REMEDIES = {
    errno.EPERM: "see that this process may use KVM",
    errno.EACCES: "see that this user may open /dev/kvm (group kvm)",
    errno.ENOMEM: "free memory of the host, or give the machine less",
    errno.EMFILE: "raise this process's limit of open files (ulimit -n)",
    errno.ENFILE: "raise the host's limit of open files (fs.file-max)",
    errno.ENOSPC: "the kernel has no more room for such a registration; use fewer devices",
    errno.EBUSY: "another hypervisor may have the processor; end it",
    errno.ENOTTY: "this kernel's KVM does not know the call; use a newer kernel",
    errno.E2BIG: "this processor has more than is expected here; report it",
}
_NO_REMEDY = "KVM refused values of ours: report it, with this message"


class KvmError(Exception):
    """A call of KVM failed: which, with what, why, and what to do."""

    def __init__(self, call: Call, argument: str, number: int) -> None:
        remedy = _REMEDIES.get(number, _NO_REMEDY)
        shown = f"({argument})" if argument else ""
        super().__init__(
            f"{call.name}{shown}, to {call.purpose}, failed: {os.strerror(number)}; {remedy}"
        )
        self.call = call
        self.errno = number


_libc = ctypes.CDLL(None, use_errno=True)
# Not fcntl.ioctl, which refuses integers of 2^31 and more.
_ioctl_value = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, use_errno=True
)(("ioctl", _libc))


def ioctl(
    fd: int, call: Call, argument: int | ctypes.Structure | ctypes._SimpleCData[int] = 0
) -> int:
    """Make the call; what it returns, 0 or more. Raises KvmError."""
    value = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result = int(_ioctl_value(fd, call.number, value))
    if result < 0:
        raise KvmError(call, _shown(argument), ctypes.get_errno())
    return result


def _shown(argument: int | ctypes.Structure | ctypes._SimpleCData[int]) -> str:
    """An argument as a message has it: small structures by their numbers."""
    if isinstance(argument, int):
        return f"{argument:#x}" if argument else ""
    if isinstance(argument, ctypes._SimpleCData):
        return f"{argument.value:#x}"
    fields = argument._fields_
    plain = {field[0]: getattr(argument, field[0]) for field in fields}
    return ", ".join(
        f"{name}={value:#x}" for name, value in plain.items() if isinstance(value, int)
    )
