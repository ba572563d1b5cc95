"""Guests of a few instructions on the real `/dev/kvm`: what they do arrives, and they obey."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

import pytest
from bare_metal import CODE, MIB, WAIT, BareMachine, Recorder, bare_machine

from voidbus.vm.devices.bus import Registers
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.kvm.ending import Ending, EndKind
from voidbus.vm.kvm.memory import LOW_END, Ram

pytestmark = pytest.mark.needs("kvm")

ENDLESS = """
    eb fe           ; jmp to itself
"""
COUNTING = """
    e6 10           ; out 0x10, al
    fe c0           ; inc al
    eb fa           ; jmp to the start
"""


class Meeting(Registers):
    """Keeps whoever writes until everybody has written: two vCPUs at the same time."""

    def __init__(self) -> None:
        self.met = threading.Event()
        self._barrier = threading.Barrier(2, self.met.set, WAIT)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            self._barrier.wait()


def test_a_guest_writes_to_ports_with_every_width() -> None:
    with bare_machine() as machine:
        device = Recorder()
        machine.ports.add(0x10, 8, device, "recorder")
        machine.start("""
            b0 41               ; mov al, 0x41
            e6 10               ; out 0x10, al
            b8 34 12            ; mov ax, 0x1234
            e7 12               ; out 0x12, ax
            66 b8 78 56 34 12   ; mov eax, 0x12345678
            66 e7 14            ; out 0x14, eax
            f4                  ; hlt
        """)
        assert machine.ending() == Ending(EndKind.GUEST, "halted, and nothing can wake it")
        assert device.writes == [(0, 1, 0x41), (2, 2, 0x1234), (4, 4, 0x12345678)]


def test_a_guest_reads_a_port_and_gets_no_more_than_its_width() -> None:
    with bare_machine() as machine:
        device = Recorder(answer=-1)
        machine.ports.add(0x10, 1, device, "recorder")
        machine.start("""
            31 c0           ; xor ax, ax
            e4 10           ; in al, 0x10
            a3 00 20        ; mov [0x2000], ax
            f4              ; hlt
        """)
        machine.ending()
        assert machine.ram.memory.read(0x2000, 2) == b"\xff\x00"
        assert device.reads == [(0, 1)]


def test_where_no_device_is_reads_give_ones_and_writes_go_nowhere() -> None:
    with bare_machine() as machine:
        machine.start("""
            e5 70           ; in ax, 0x70
            e7 70           ; out 0x70, ax
            a3 00 20        ; mov [0x2000], ax
            f4              ; hlt
        """)
        machine.ending()
        assert machine.ram.memory.read(0x2000, 2) == b"\xff\xff"
        assert machine.ports.accesses == {"nothing": 2}


def test_a_string_instruction_writes_each_of_its_elements() -> None:
    with bare_machine() as machine:
        device = Recorder()
        machine.ports.add(0x10, 1, device, "recorder")
        machine.ram.memory.write(0x2000, b"void")
        machine.start("""
            be 00 20        ; mov si, 0x2000
            b9 04 00        ; mov cx, 4
            ba 10 00        ; mov dx, 0x10
            fc              ; cld
            f3 6e           ; rep outsb
            f4              ; hlt
        """)
        machine.ending()
        assert bytes(value for _, _, value in device.writes) == b"void"


def test_an_access_beyond_memory_goes_to_the_device_there() -> None:
    with bare_machine(memory=MIB) as machine:
        device = Recorder(answer=0xBEEF)
        machine.mmio.add(0x10_0000, 0x1000, device, "recorder")
        machine.start("""
            b8 ff ff        ; mov ax, 0xffff
            8e d8           ; mov ds, ax: addresses from 0xffff0 on
            c7 06 14 00 34 12   ; mov word [0x14], 0x1234: to 0x100004
            a1 18 00        ; mov ax, [0x18]: from 0x100008
            31 db           ; xor bx, bx
            8e db           ; mov ds, bx
            a3 00 20        ; mov [0x2000], ax
            f4              ; hlt
        """)
        machine.ending()
        assert device.writes == [(4, 2, 0x1234)]
        assert device.reads == [(8, 2)]
        assert machine.ram.memory.read(0x2000, 2) == b"\xef\xbe"


def test_a_triple_fault_is_a_reset() -> None:
    with bare_machine() as machine:
        machine.load("0f 0b ; ud2, for which there is no handler, nor one for that")
        machine.enter_at(machine.vcpus[0], CODE)
        system = machine.vcpus[0].system_registers()
        system.cr0 |= 1  # protected mode
        for segment in (system.cs, system.ds, system.es, system.ss):
            segment.limit, segment.selector = 0xFFFF_FFFF, 16
            segment.s = segment.present = segment.db = segment.g = 1
            segment.type = 3  # data that can be written
        system.cs.type, system.cs.selector = 11, 8  # code that can be read
        system.idt.limit = 0
        machine.vcpus[0].set_system_registers(system)
        machine.threads.start()
        assert machine.ending() == Ending(EndKind.GUEST, "reset by a triple fault")


def test_an_instruction_outside_of_memory_ends_the_machine_with_its_registers() -> None:
    with bare_machine(memory=MIB) as machine:
        machine.start("""
            66 bb 0d f0 00 00   ; mov ebx, 0xf00d
            ea 10 00 ff ff      ; jmp 0xffff:0x0010: to 0x100000, where nothing is
        """)
        ending = machine.ending()
        assert ending.kind is EndKind.FAULT
        assert "vCPU 0: " in ending.reason
        assert "rbx 0xf00d" in ending.reason
        assert "rip 0x10" in ending.reason


def test_a_device_that_breaks_ends_the_machine_with_its_reason() -> None:
    class Broken(Registers):
        def read(self, offset: int, size: int) -> int:
            raise DeviceError("the driver broke a rule")

        def write(self, offset: int, size: int, value: int) -> None: ...

    with bare_machine() as machine:
        machine.ports.add(0x10, 1, Broken(), "broken")
        machine.start("e4 10 ; in al, 0x10")
        assert machine.ending() == Ending(EndKind.FAULT, "vCPU 0: the driver broke a rule")


def test_a_defect_of_a_device_ends_the_machine_and_is_told() -> None:
    class Defective(Registers):
        def read(self, offset: int, size: int) -> int:
            raise KeyError(size)

        def write(self, offset: int, size: int, value: int) -> None: ...

    with bare_machine() as machine:
        machine.ports.add(0x10, 1, Defective(), "defective")
        machine.start("e4 10 ; in al, 0x10")
        assert machine.ending().reason == "a defect at vCPU 0: KeyError: 1"


def test_an_endless_loop_is_ended_at_once() -> None:
    with bare_machine() as machine:
        machine.start(ENDLESS)
        began = time.monotonic()
        machine.threads.stop()
        assert machine.threads.join(WAIT)
        assert time.monotonic() - began < 1.0
        assert machine.ending() == Ending(EndKind.STOPPED, "stopped")


def test_a_guest_that_never_stops_exiting_is_ended_at_once() -> None:
    with bare_machine() as machine:
        machine.start(COUNTING)
        machine.threads.stop()
        assert machine.threads.join(WAIT)
        assert machine.ending().kind is EndKind.STOPPED


def test_the_first_reason_to_stop_is_the_one_that_counts() -> None:
    with bare_machine() as machine:
        machine.start(ENDLESS)
        machine.threads.stop(Ending(EndKind.FAULT, "a device is gone"))
        machine.threads.stop()
        assert machine.ending() == Ending(EndKind.FAULT, "a device is gone")


def test_a_paused_guest_does_nothing_and_goes_on_where_it_was() -> None:
    with bare_machine() as machine:
        device = Recorder()
        machine.ports.add(0x10, 1, device, "recorder")
        machine.start(COUNTING)
        device.wait_for(10)
        for _ in range(20):
            assert machine.threads.pause(WAIT)
            count = len(device.writes)
            assert machine.vcpus[0].registers().rip in range(0x1000, 0x1006)
            assert len(device.writes) == count
            machine.threads.resume()
            device.wait_for(count + 10)
        machine.threads.stop()
        assert machine.threads.join(WAIT)
        values = [value for _, _, value in device.writes]
        assert values == [number % 256 for number in range(len(values))]


def test_a_paused_guest_can_be_ended() -> None:
    with bare_machine() as machine:
        machine.start(ENDLESS)
        assert machine.threads.pause(WAIT)
        machine.threads.stop()
        assert machine.threads.join(WAIT)
        assert not machine.threads.pause(WAIT)


def test_a_guest_that_has_ended_can_not_be_paused() -> None:
    with bare_machine() as machine:
        machine.start("f4 ; hlt")
        machine.ending()
        assert not machine.threads.pause(WAIT)


def test_two_vcpus_run_at_the_same_time() -> None:
    with bare_machine(vcpus=2) as machine:
        machine.load("""
            f3 90           ; pause
            80 3e 00 20 01  ; cmp byte [0x2000], 1
            75 f7           ; jne to the pause: wait for the other one
            c6 06 01 20 01  ; mov byte [0x2001], 1
            e6 10           ; out 0x10, al: it waits there
            f4              ; hlt
        """)
        machine.load(
            """
            c6 06 00 20 01  ; mov byte [0x2000], 1
            f3 90           ; pause
            80 3e 01 20 01  ; cmp byte [0x2001], 1
            75 f7           ; jne to the pause
            e6 11           ; out 0x11, al
            f4              ; hlt
            """,
            0x3000,
        )
        device = Meeting()
        machine.ports.add(0x10, 2, device, "meeting")
        machine.enter_at(machine.vcpus[1], 0x3000)
        machine.start()
        assert device.met.wait(WAIT)
        machine.threads.stop()


def test_an_end_of_one_vcpu_ends_the_other_and_is_told_once() -> None:
    with bare_machine(vcpus=2) as machine:
        machine.load(ENDLESS, 0x3000)
        machine.enter_at(machine.vcpus[1], 0x3000)
        machine.start("f4 ; hlt")
        assert machine.ending().kind is EndKind.GUEST
        assert machine.threads.join(WAIT)
        assert len(machine.endings) == 1


WAITING = """
    31 c0               ; xor ax, ax
    c7 06 80 00 00 11   ; mov word [0x80], 0x1100: the handler of vector 0x20
    a3 82 00            ; mov [0x82], ax: in segment 0
    b0 11               ; mov al, 0x11: begin to set up the PIC
    e6 20               ; out 0x20, al
    b0 20               ; mov al, 0x20: its lines are vectors 0x20 and on
    e6 21               ; out 0x21, al
    b0 04               ; mov al, 4: the second PIC is on line 2
    e6 21               ; out 0x21, al
    b0 01               ; mov al, 1: for x86
    e6 21               ; out 0x21, al
    b0 fe               ; mov al, 0xfe: only line 0
    e6 21               ; out 0x21, al
    e6 10               ; out 0x10, al: ready
    fb                  ; sti
    f4                  ; hlt
    eb fd               ; jmp to the hlt
"""
HANDLER = """
    e6 11               ; out 0x11, al
    b0 20               ; mov al, 0x20: end of interrupt
    e6 20               ; out 0x20, al
    cf                  ; iret
"""


def waiting_for_interrupts(machine: BareMachine) -> Recorder:
    """Start a guest that says so on the device when it waits, and at each interrupt."""
    apic = machine.vcpus[0].local_apic()
    apic.regs[0x350:0x354] = (0x700).to_bytes(4, "little")  # LINT0 delivers the PIC's
    machine.vcpus[0].set_local_apic(apic)
    device = Recorder()
    machine.ports.add(0x10, 2, device, "recorder")
    machine.load(HANDLER, 0x1100)
    machine.start(WAITING)
    device.wait_for(1)
    return device


def test_a_write_to_an_eventfd_interrupts_a_guest_that_waits() -> None:
    eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        with bare_machine(irqchip=True) as machine:
            machine.vm.raise_line_by(eventfd, 0)
            device = waiting_for_interrupts(machine)
            for number in range(3):
                os.eventfd_write(eventfd, 1)
                device.wait_for(2 + number)
            assert [offset for offset, _, _ in device.writes] == [0, 1, 1, 1]
    finally:
        os.close(eventfd)


def test_a_guest_that_waits_for_interrupts_is_paused_and_ended_at_once() -> None:
    with bare_machine(irqchip=True) as machine:
        waiting_for_interrupts(machine)
        assert machine.threads.pause(WAIT)
        machine.threads.resume()
        machine.threads.stop()
        assert machine.threads.join(WAIT)


def test_a_write_that_stands_for_an_eventfd_causes_no_exit() -> None:
    eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
    try:
        with bare_machine(memory=MIB) as machine:
            device = Recorder()
            machine.mmio.add(0x10_0000, 0x1000, device, "recorder")
            for value, eventfd in enumerate(eventfds):
                machine.vm.signal_writes(eventfd, 0x10_0050, value)
            machine.start("""
                b8 ff ff                    ; mov ax, 0xffff
                8e d8                       ; mov ds, ax: addresses from 0xffff0 on
                66 c7 06 60 00 01 00 00 00  ; mov dword [0x60], 1: to 0x100050
                66 c7 06 60 00 02 00 00 00  ; mov dword [0x60], 2: no eventfd for that
                f4                          ; hlt
            """)
            machine.ending()
            assert device.writes == [(0x50, 4, 2)]
            assert not select.select([eventfds[0]], [], [], 0)[0]
            assert os.eventfd_read(eventfds[1]) == 1
    finally:
        for eventfd in eventfds:
            os.close(eventfd)


def test_a_vcpu_that_nobody_has_started_waits_and_can_be_ended() -> None:
    with bare_machine(vcpus=2, irqchip=True) as machine:
        device = Recorder()
        machine.ports.add(0x10, 1, device, "recorder")
        machine.start("""
            e6 10           ; out 0x10, al
            eb fe           ; jmp to itself
        """)
        device.wait_for(1)
        assert machine.threads.pause(WAIT)
        machine.threads.resume()


def test_memory_past_three_gibibytes_goes_on_above_four() -> None:
    ram = Ram(LOW_END + MIB)
    try:
        slots = [(slot.address, slot.size) for slot in ram.slots]
        assert slots == [(0, LOW_END), (1 << 32, MIB)]
        ram.memory.write(1 << 32, b"high")
        assert os.pread(ram.fd, 4, LOW_END) == b"high"
    finally:
        ram.close()


@pytest.mark.parametrize("size", [0, -4096, 100])
def test_memory_is_whole_pages(size: int) -> None:
    with pytest.raises(ValueError, match="pages"):
        Ram(size)
