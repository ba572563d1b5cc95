"""The structures of the KVM interface that are used here, as the kernel lays them out.

Names and fields are those of `linux/kvm.h` and of x86's `asm/kvm.h`; the sections are those of
`Documentation/virt/kvm/api.rst`. A test compares all of them with the headers where those are
installed.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64


class KvmRegs(ctypes.Structure):
    """4.11 KVM_GET_REGS: general registers."""

    c_name = "struct kvm_regs"
    _fields_ = [
        *((name, u64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *((name, u64) for name in ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")),
        *((name, u64) for name in ("rip", "rflags")),
    ]


class KvmSegment(ctypes.Structure):
    """4.13 KVM_GET_SREGS: one segment register with what is cached of its descriptor."""

    c_name = "struct kvm_segment"
    _fields_ = [
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        *((name, u8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl")),
        ("unusable", u8),
        ("padding", u8),
    ]


class KvmDtable(ctypes.Structure):
    """4.13 KVM_GET_SREGS: where a descriptor table is."""

    c_name = "struct kvm_dtable"
    _fields_ = [("base", u64), ("limit", u16), ("padding", u16 * 3)]


class KvmSregs(ctypes.Structure):
    """4.13 KVM_GET_SREGS: segments, tables and control registers."""

    c_name = "struct kvm_sregs"
    _fields_ = [
        *((name, KvmSegment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        *((name, KvmDtable) for name in ("gdt", "idt")),
        *((name, u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", u64 * 4),
    ]


class KvmFpu(ctypes.Structure):
    """4.22 KVM_GET_FPU."""

    c_name = "struct kvm_fpu"
    _fields_ = [
        ("fpr", u8 * 128),
        ("fcw", u16),
        ("fsw", u16),
        ("ftwx", u8),
        ("pad1", u8),
        ("last_opcode", u16),
        ("last_ip", u64),
        ("last_dp", u64),
        ("xmm", u8 * 256),
        ("mxcsr", u32),
        ("pad2", u32),
    ]


class KvmLapicState(ctypes.Structure):
    """4.57 KVM_GET_LAPIC: the registers of a local APIC, at the offsets the processor's manual
    gives them."""

    c_name = "struct kvm_lapic_state"
    _fields_ = [("regs", u8 * 0x400)]


class KvmMsrEntry(ctypes.Structure):
    """4.18 KVM_GET_MSRS: one model specific register."""

    c_name = "struct kvm_msr_entry"
    _fields_ = [("index", u32), ("reserved", u32), ("data", u64)]


class KvmCpuidEntry2(ctypes.Structure):
    """4.46 KVM_GET_SUPPORTED_CPUID: what CPUID answers for one leaf and subleaf."""

    c_name = "struct kvm_cpuid_entry2"
    _fields_ = [
        *((name, u32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", u32 * 3),
    ]


class KvmMpState(ctypes.Structure):
    """4.38 KVM_GET_MP_STATE."""

    c_name = "struct kvm_mp_state"
    _fields_ = [("mp_state", u32)]


class KvmTranslation(ctypes.Structure):
    """4.15 KVM_TRANSLATE: where a linear address of the guest leads."""

    c_name = "struct kvm_translation"
    _fields_ = [
        ("linear_address", u64),
        ("physical_address", u64),
        *((name, u8) for name in ("valid", "writeable", "usermode")),
        ("pad", u8 * 5),
    ]


class KvmUserspaceMemoryRegion(ctypes.Structure):
    """4.35 KVM_SET_USER_MEMORY_REGION: a piece of guest memory and where it is in this process."""

    c_name = "struct kvm_userspace_memory_region"
    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    ]


class KvmIrqfd(ctypes.Structure):
    """4.75 KVM_IRQFD: an eventfd that raises an interrupt."""

    c_name = "struct kvm_irqfd"
    _fields_ = [("fd", u32), ("gsi", u32), ("flags", u32), ("resamplefd", u32), ("pad", u8 * 16)]


class KvmIoeventfd(ctypes.Structure):
    """4.59 KVM_IOEVENTFD: a write of the guest that signals an eventfd in place of an exit."""

    c_name = "struct kvm_ioeventfd"
    _fields_ = [
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", ctypes.c_int32),
        ("flags", u32),
        ("pad", u8 * 36),
    ]


class KvmEnableCap(ctypes.Structure):
    """4.37 KVM_ENABLE_CAP."""

    c_name = "struct kvm_enable_cap"
    _fields_ = [("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64)]


class KvmPitConfig(ctypes.Structure):
    """4.71 KVM_CREATE_PIT2."""

    c_name = "struct kvm_pit_config"
    _fields_ = [("flags", u32), ("pad", u32 * 15)]


class RunIo(ctypes.Structure):
    """5, KVM_EXIT_IO: an access to a port."""

    _fields_ = [
        ("direction", u8),
        ("size", u8),
        ("port", u16),
        ("count", u32),
        ("data_offset", u64),
    ]


class RunMmio(ctypes.Structure):
    """5, KVM_EXIT_MMIO: an access to an address that is no memory."""

    _fields_ = [("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8)]


class RunFailEntry(ctypes.Structure):
    """5, KVM_EXIT_FAIL_ENTRY: the processor refused to enter the guest."""

    _fields_ = [("hardware_entry_failure_reason", u64), ("cpu", u32)]


class RunInternal(ctypes.Structure):
    """5, KVM_EXIT_INTERNAL_ERROR: KVM itself can't go on."""

    _fields_ = [("suberror", u32), ("ndata", u32), ("data", u64 * 16)]


class RunSystemEvent(ctypes.Structure):
    """5, KVM_EXIT_SYSTEM_EVENT."""

    _fields_ = [("type", u32), ("ndata", u32), ("data", u64 * 16)]


class RunHardware(ctypes.Structure):
    """5, KVM_EXIT_UNKNOWN: the processor's own reason, which KVM does not know."""

    _fields_ = [("hardware_exit_reason", u64)]


class RunExit(ctypes.Union):
    """What an exit says besides its reason."""

    _fields_ = [
        ("hw", RunHardware),
        ("fail_entry", RunFailEntry),
        ("io", RunIo),
        ("mmio", RunMmio),
        ("internal", RunInternal),
        ("system_event", RunSystemEvent),
        ("padding", u8 * 256),
    ]


class KvmRun(ctypes.Structure):
    """5, the kvm_run structure: the head of what a vCPU shares with this process. ``cause`` has
    no name in the kernel's."""

    c_name = "struct kvm_run"
    _fields_ = [
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("cause", RunExit),
    ]


NAMED = (
    *(KvmRegs, KvmSegment, KvmDtable, KvmSregs, KvmFpu, KvmLapicState, KvmMsrEntry),
    *(KvmCpuidEntry2, KvmMpState, KvmUserspaceMemoryRegion, KvmIrqfd, KvmIoeventfd),
    *(KvmEnableCap, KvmPitConfig, KvmTranslation, KvmRun),
)
"""Those the kernel's headers have a name for."""


def msr_list(registers: dict[int, int]) -> ctypes.Structure:
    """4.19 `struct kvm_msrs` with these registers and their values."""

    class KvmMsrs(ctypes.Structure):
        _fields_ = [("nmsrs", u32), ("pad", u32), ("entries", KvmMsrEntry * len(registers))]

    entries = (KvmMsrEntry(index, 0, value) for index, value in registers.items())
    return KvmMsrs(len(registers), 0, tuple(entries))


class CpuidTable(ctypes.Structure):
    """4.46 `struct kvm_cpuid2` with room for as many entries as KVM ever has (256,
    KVM_MAX_CPUID_ENTRIES in its `asm/kvm_host.h`)."""

    _fields_ = [("nent", u32), ("padding", u32), ("entries", KvmCpuidEntry2 * 256)]


class SignalMask(ctypes.Structure):
    """4.21 `struct kvm_signal_mask` with the kernel's set of 64 signals."""

    _pack_ = 1
    _fields_ = [("len", u32), ("sigset", u64)]
