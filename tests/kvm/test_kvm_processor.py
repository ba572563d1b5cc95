"""The processor a guest sees, on the real `/dev/kvm`."""

from __future__ import annotations

from pathlib import Path

import pytest
from bare_metal import bare_machine

from voidbus.vm.kvm.loading import ZERO_PAGE
from voidbus.vm.kvm.processor import cpuid_for, enter_kernel, set_up
from voidbus.vm.kvm.structures import CpuidTable, KvmCpuidEntry2
from voidbus.vm.kvm.system import Kvm, KvmUnavailable

pytestmark = pytest.mark.needs("kvm")


def leaf(table: CpuidTable, function: int, index: int = 0) -> KvmCpuidEntry2:
    entries: list[KvmCpuidEntry2] = [
        entry
        for entry in table.entries[: table.nent]
        if entry.function == function and entry.index == index
    ]
    assert len(entries) == 1, f"{len(entries)} entries for {function:#x}, {index}"
    return entries[0]


def tables(count: int) -> list[CpuidTable]:
    kvm = Kvm()
    try:
        return [cpuid_for(kvm, number, count) for number in range(count)]
    finally:
        kvm.close()


def test_a_guest_is_told_of_its_hypervisor_and_of_no_virtualisation_of_its_own() -> None:
    (table,) = tables(1)
    assert leaf(table, 1).ecx & 1 << 31
    assert not leaf(table, 1).ecx & 1 << 5
    assert not leaf(table, 0x8000_0001).ecx & 1 << 2
    assert bytes(leaf(table, 0x4000_0000))[16:28] == b"KVMKVMKVM\0\0\0"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 200])
def test_every_vcpu_knows_its_place_among_the_cores_of_one_package(count: int) -> None:
    for number, table in enumerate(tables(count)):
        assert leaf(table, 1).ebx >> 24 == number
        assert bool(leaf(table, 1).edx & 1 << 28) == (count > 1)
        threads, cores, end = (leaf(table, 0xB, index) for index in range(3))
        assert (threads.eax, threads.ebx, threads.ecx, threads.edx) == (0, 1, 0x100, number)
        assert (cores.ebx, cores.ecx, cores.edx) == (count, 0x201, number)
        assert (count - 1) >> cores.eax == 0
        assert (end.ebx, end.ecx) == (0, 2)


def test_the_first_vcpu_begins_in_long_mode_at_the_entry_with_the_zero_page() -> None:
    kvm = Kvm()
    try:
        with bare_machine(irqchip=True) as machine:
            set_up(machine.vcpus[0], kvm, 1)
            enter_kernel(machine.vcpus[0], 0x100_0000)
            registers = machine.vcpus[0].registers()
            assert (registers.rip, registers.rsi, registers.rflags) == (0x100_0000, ZERO_PAGE, 2)
            system = machine.vcpus[0].system_registers()
            assert system.efer & 0x500 == 0x500
            assert system.cr0 & 0x8000_0001 == 0x8000_0001
            assert (system.cs.selector, system.cs.l, system.ss.selector) == (0x10, 1, 0x18)
            apic = bytes(machine.vcpus[0].local_apic().regs)
            assert apic[0x351] & 7 == 7
            assert apic[0x361] & 7 == 4
    finally:
        kvm.close()


def test_what_is_no_kvm_is_refused_with_the_reason() -> None:
    with pytest.raises(KvmUnavailable, match="can't be opened: No such file"):
        Kvm(Path("/dev/no-kvm"))
    with pytest.raises(KvmUnavailable, match="does not answer as KVM"):
        Kvm(Path("/dev/null"))
