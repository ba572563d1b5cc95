"""The processor a guest sees, and the state its first vCPU begins in.

CPUID leaves are those of the Intel manual, volume 2, "CPUID", and of AMD's volume 3, appendix E.
"""

from __future__ import annotations

import contextlib

from voidbus.vm.kvm.calls import KvmError
from voidbus.vm.kvm.loading import (
    CODE_SELECTOR,
    DATA_SELECTOR,
    DESCRIPTOR_TABLE,
    DESCRIPTOR_TABLE_BYTES,
    PAGE_TABLES,
    ZERO_PAGE,
)
from voidbus.vm.kvm.structures import (
    CpuidTable,
    KvmCpuidEntry2,
    KvmFpu,
    KvmRegs,
    KvmSegment,
)
from voidbus.vm.kvm.system import TSC_DEADLINE_TIMER, Kvm
from voidbus.vm.kvm.vcpu import Vcpu

MOST_VCPUS = 254
"""Ids of local APICs have 8 bits, the last one stands for all of them, and the I/O APIC has one."""

_HYPERVISOR, _TSC_DEADLINE, _VMX = 1 << 31, 1 << 24, 1 << 5  # leaf 1, ECX
_HTT = 1 << 28  # leaf 1, EDX
_SVM = 1 << 2  # leaf 0x80000001, ECX
_PER_SUBLEAF = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
_THREAD_LEVEL, _CORE_LEVEL = 1 << 8, 2 << 8  # leaf 0xB, ECX

_PERFORMANCE, _TOPOLOGY, _TOPOLOGY_2, _SVM_LEAF = 0xA, 0xB, 0x1F, 0x8000_000A
_CACHE_LEVEL_SHIFT, _SHARERS_SHIFT, _CORES_SHIFT = 5, 14, 26  # leaf 4, EAX

_MISC_ENABLE, _MTRR_DEFAULT = 0x1A0, 0x2FF
_FAST_STRINGS = 1 << 0
_WRITE_BACK = 1 << 11 | 6
"""MTRRs on, and memory they don't name is cached: firmware would have set that."""

_LINT0, _LINT1 = 0x350, 0x360  # registers of the local APIC
_EXTERNAL, _NMI, _DELIVERY = 0x700, 0x400, 0x700

_CR0 = 1 << 31 | 1 << 4 | 1 << 0  # paging, ET, protected mode
_CR4 = 1 << 5  # PAE
_EFER = 1 << 10 | 1 << 8  # long mode active, enabled
_CODE, _DATA, _TSS = 11, 3, 11


def cpuid_for(kvm: Kvm, number: int, count: int) -> CpuidTable:
    """What CPUID answers on vCPU ``number`` of ``count``: what KVM can do, less virtualisation of
    its own and performance counters, in one package of cores with one thread each. Raises
    KvmError."""
    supported = kvm.supported_cpuid()
    deadline = bool(kvm.capability(TSC_DEADLINE_TIMER))
    table = CpuidTable()
    for entry in supported.entries[: supported.nent]:
        if entry.function in (_PERFORMANCE, _TOPOLOGY, _TOPOLOGY_2, _SVM_LEAF):
            continue
        _adapt(entry, number, count, deadline=deadline)
        table.entries[table.nent] = entry
        table.nent += 1
    for entry in _topology(number, count):
        table.entries[table.nent] = entry
        table.nent += 1
    return table


def _adapt(entry: KvmCpuidEntry2, number: int, count: int, *, deadline: bool) -> None:
    bits = _id_bits(count)
    match entry.function:
        case 1:
            entry.ebx = entry.ebx & 0xFFFF | number << 24 | min(1 << bits, 255) << 16
            entry.ecx = entry.ecx & ~_VMX | _HYPERVISOR | (_TSC_DEADLINE if deadline else 0)
            entry.edx = entry.edx & ~_HTT | (_HTT if count > 1 else 0)
        case 4 | 0x8000_001D:
            level = entry.eax >> _CACHE_LEVEL_SHIFT & 7
            sharers = (1 << bits) - 1 if level >= 3 else 0
            entry.eax = entry.eax & 0x3FFF | sharers << _SHARERS_SHIFT
            if entry.function == 4 and entry.eax & 0x1F:
                entry.eax |= (1 << bits) - 1 << _CORES_SHIFT
        case 0x8000_0001:
            entry.ecx &= ~_SVM
        case 0x8000_0008:
            entry.ecx = bits << 12 | count - 1
        case 0x8000_001E:
            entry.eax, entry.ebx, entry.ecx = number, number, 0


def _id_bits(count: int) -> int:
    """Bits of an APIC id that tell vCPUs apart."""
    return (count - 1).bit_length()


def _topology(number: int, count: int) -> list[KvmCpuidEntry2]:
    """Leaf 0xB: a level of threads, one each; a level of cores; the end."""
    levels = (
        (0, 1, _THREAD_LEVEL | 0),
        (_id_bits(count), count, _CORE_LEVEL | 1),
        (0, 0, 2),
    )
    return [
        KvmCpuidEntry2(_TOPOLOGY, index, _PER_SUBLEAF, eax, ebx, ecx, number)
        for index, (eax, ebx, ecx) in enumerate(levels)
    ]


def set_up(vcpu: Vcpu, kvm: Kvm, count: int) -> None:
    """What firmware leaves behind on every processor. Raises KvmError."""
    vcpu.set_cpuid(cpuid_for(kvm, vcpu.number, count))
    for register, value in ((_MISC_ENABLE, _FAST_STRINGS), (_MTRR_DEFAULT, _WRITE_BACK)):
        with contextlib.suppress(KvmError):  # a processor without it needs no setting
            vcpu.set_msrs({register: value})
    apic = vcpu.local_apic()
    for register, mode in ((_LINT0, _EXTERNAL), (_LINT1, _NMI)):
        value = int.from_bytes(bytes(apic.regs[register : register + 4]), "little")
        value = value & ~_DELIVERY | mode
        apic.regs[register : register + 4] = value.to_bytes(4, "little")
    vcpu.set_local_apic(apic)
    vcpu.set_fpu(KvmFpu(fcw=0x37F, mxcsr=0x1F80))  # as after FNINIT


def enter_kernel(vcpu: Vcpu, entry: int) -> None:
    """Have the first vCPU begin at a kernel's 64-bit entry: long mode, memory mapped to itself,
    interrupts off, the zero page in RSI. Raises KvmError."""
    system = vcpu.system_registers()
    data = KvmSegment(0, 0xFFFF_FFFF, DATA_SELECTOR, _DATA, present=1, db=1, s=1, g=1)
    system.cs = KvmSegment(0, 0xFFFF_FFFF, CODE_SELECTOR, _CODE, present=1, s=1, l=1, g=1)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(system, name, data)
    system.tr = KvmSegment(0, 0xFFFF, 0, _TSS, present=1)
    system.gdt.base, system.gdt.limit = DESCRIPTOR_TABLE, DESCRIPTOR_TABLE_BYTES - 1
    system.idt.base = system.idt.limit = 0
    system.cr0, system.cr3, system.cr4, system.efer = _CR0, PAGE_TABLES, _CR4, _EFER
    vcpu.set_system_registers(system)
    vcpu.set_registers(KvmRegs(rip=entry, rsi=ZERO_PAGE, rsp=ZERO_PAGE, rflags=2))
