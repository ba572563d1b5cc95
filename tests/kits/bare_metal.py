"""Guests of a few instructions on `/dev/kvm`: 16-bit code at CODE, in real mode, no kernel."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from voidbus.vm.devices.bus import Bus, Registers
from voidbus.vm.kvm.ending import Ending
from voidbus.vm.kvm.memory import Ram
from voidbus.vm.kvm.structures import KvmRegs
from voidbus.vm.kvm.system import Kvm
from voidbus.vm.kvm.vcpu import Vcpu
from voidbus.vm.kvm.vcpu_threads import VcpuThreads
from voidbus.vm.kvm.virtual_machine import VirtualMachine

CODE = 0x1000
STACK = 0x8000
WAIT = 20.0
"""Seconds a test waits for what must come."""
MIB = 1 << 20


def code(text: str) -> bytes:
    """The bytes of a listing: a line each instruction, in hexadecimal, then a comment."""
    return b"".join(bytes.fromhex(line.partition(";")[0]) for line in text.splitlines())


class Recorder(Registers):
    """A device that remembers what was written, and gives what it is told to."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.writes: list[tuple[int, int, int]] = []
        self.reads: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    def read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> None:
        with self._changed:
            self.writes.append((offset, size, value))
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until so many writes came."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.writes) >= count, WAIT), self.writes


class BareMachine:
    """A machine of bare metal. Devices are added to ``ports`` and ``mmio`` before ``start``."""

    def __init__(self, *, vcpus: int, memory: int, irqchip: bool, split: bool) -> None:
        with contextlib.ExitStack() as stack:
            self.kvm = Kvm()
            stack.callback(self.kvm.close)
            self.ram = Ram(memory)
            stack.callback(self.ram.close)
            self.vm = VirtualMachine(self.kvm, self.ram)
            stack.callback(self.vm.close)
            if irqchip:
                self.vm.create_interrupt_controllers(split=split)
            self.vcpus: list[Vcpu] = []
            for number in range(vcpus):
                vcpu = self.vm.create_vcpu(number)
                stack.callback(vcpu.close)
                self.vcpus.append(vcpu)
            self._open = stack.pop_all()
        self.ports = Bus()
        self.mmio = Bus()
        self.endings: list[Ending] = []
        self._ended = threading.Event()
        self.threads = VcpuThreads(
            self.vcpus, self.ram.memory, self.ports, self.mmio, self._end, name="bare"
        )

    def _end(self, ending: Ending) -> None:
        self.endings.append(ending)
        self._ended.set()

    def load(self, listing: str, address: int = CODE) -> None:
        self.ram.memory.write(address, code(listing))

    def enter_at(self, vcpu: Vcpu, address: int) -> None:
        """Have it begin there in real mode, with flat segments at 0."""
        system = vcpu.system_registers()
        for segment in (system.cs, system.ds, system.es, system.ss):
            segment.base = segment.selector = 0
        vcpu.set_system_registers(system)
        vcpu.set_registers(KvmRegs(rip=address, rflags=2, rsp=STACK))

    def start(self, listing: str | None = None) -> None:
        if listing is not None:
            self.load(listing)
        self.enter_at(self.vcpus[0], CODE)
        self.threads.start()

    def ending(self) -> Ending:
        """How it ended, once it has."""
        assert self._ended.wait(WAIT), f"it runs on; exits: {self.threads.exits}"
        assert len(self.endings) == 1
        return self.endings[0]

    def close(self) -> None:
        self.threads.stop()
        assert self.threads.join(WAIT)
        self._open.close()


@contextlib.contextmanager
def bare_machine(
    *, vcpus: int = 1, memory: int = 4 * MIB, irqchip: bool = False, split: bool = False
) -> Iterator[BareMachine]:
    """A machine; at the end it is stopped, and no thread or descriptor of it is left."""
    threads = set(threading.enumerate())
    files = len(list(Path("/proc/self/fd").iterdir()))
    machine = BareMachine(vcpus=vcpus, memory=memory, irqchip=irqchip, split=split)
    try:
        yield machine
    finally:
        machine.close()
    assert set(threading.enumerate()) == threads
    assert len(list(Path("/proc/self/fd").iterdir())) <= files
