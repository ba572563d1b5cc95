"""How a guest ends, in words: of its own accord, or because its processor can't go on."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from voidbus.vm.devices.faults import GuestMemoryError
from voidbus.vm.devices.memory import GuestMemory
from voidbus.vm.kvm.calls import KvmError
from voidbus.vm.kvm.vcpu import ExitReason, Vcpu

_SHOWN = ("rip", "rsp", "rflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp")
_INSTRUCTION_BYTES = 15
"""The longest instruction of x86."""

_SYSTEM_EVENTS = {1: "shut down", 2: "reset", 3: "crashed"}  # KVM_SYSTEM_EVENT_...

_SUBERRORS = {
    1: "an instruction that KVM can't emulate",
    2: "an exception while another was delivered",
    3: "an event could not be delivered",
    4: "an exit that KVM does not know",
}
"""KVM_INTERNAL_ERROR_... of `linux/kvm.h`."""


_NAMES = {reason.value: reason.name for reason in ExitReason}


class EndKind(enum.Enum):
    """Whose doing an end is."""

    STOPPED = "stopped"
    """This side's."""
    GUEST = "guest"
    """The guest's: it shut down, or reset, which a triple fault is."""
    FAULT = "fault"
    """Nobody's intention."""


@dataclass(frozen=True)
class Ending:
    """Why the vCPUs of a machine run no more."""

    kind: EndKind
    reason: str


def unable(vcpu: Vcpu, reason: int, memory: GuestMemory) -> Ending:
    """The ending for an exit after which there is no going on. On the vCPU's thread."""
    cause = vcpu.state.cause
    match reason:
        case ExitReason.FAIL_ENTRY:
            what = f"entry failed: {cause.fail_entry.hardware_entry_failure_reason:#x}"
        case ExitReason.INTERNAL_ERROR:
            number = cause.internal.suberror
            what = f"KVM: {_SUBERRORS.get(number, f'internal error {number}')}"
        case ExitReason.UNKNOWN:
            what = f"an exit that KVM does not know: {cause.hw.hardware_exit_reason:#x}"
        case _:
            what = f"an unexpected exit: {_name(reason)}"
    return Ending(EndKind.FAULT, f"vCPU {vcpu.number}: {what} ({_where(vcpu, memory)})")


def system_event(vcpu: Vcpu) -> Ending:
    """The ending for KVM_EXIT_SYSTEM_EVENT."""
    event = vcpu.state.cause.system_event.type
    return Ending(EndKind.GUEST, _SYSTEM_EVENTS.get(event, f"system event {event}"))


def _name(reason: int) -> str:
    return _NAMES.get(reason, str(reason))


def _where(vcpu: Vcpu, memory: GuestMemory) -> str:
    """The registers, and the bytes at the instruction pointer."""
    try:
        registers = vcpu.registers()
        system = vcpu.system_registers()
        shown = [f"{name} {getattr(registers, name):#x}" for name in _SHOWN]
        shown += [f"{name} {getattr(system, name):#x}" for name in ("cr0", "cr2", "cr3", "cr4")]
        linear = (system.cs.base + registers.rip) & (1 << 64) - 1
        address = vcpu.physical_address(linear)
    except KvmError as error:
        return f"its registers can't be read: {error}"
    instruction = "at no address"
    if address is not None:
        room = 4096 - address % 4096  # the next page may be anywhere
        try:
            code = memory.read(address, min(_INSTRUCTION_BYTES, room))
            instruction = f"code {code.hex(' ')}"
        except GuestMemoryError:
            instruction = f"code at {address:#x}, which is not memory"
    return f"{', '.join(shown)}, {instruction}"
