"""How fast guests run here: a loop of a few instructions, timed.

A processor may name VT-x or SVM and have them emulated by what it runs on itself; then guests work,
and a stock kernel takes minutes to boot.
"""

from __future__ import annotations

import contextlib
import threading
import time

from voidbus.vm.devices.bus import Bus
from voidbus.vm.devices.memory import PAGE
from voidbus.vm.kvm.ending import Ending, EndKind
from voidbus.vm.kvm.memory import Ram
from voidbus.vm.kvm.structures import KvmRegs
from voidbus.vm.kvm.system import Kvm
from voidbus.vm.kvm.vcpu_threads import VcpuThreads
from voidbus.vm.kvm.virtual_machine import VirtualMachine

TURNS = 3_000_000
"""Turns of the loop: a millisecond or two of a processor that runs them itself."""
SLOWEST = 0.5
"""Seconds they may take, where guests are worth running. A processor takes 0.002, one that QEMU
emulates with its SVM 0.02, the emulator in a kernel without VT-x and SVM more than that."""

_JOIN_SECONDS = 10.0
_CODE = PAGE
_LOOP = bytes.fromhex(
    "66 b9" + TURNS.to_bytes(4, "little").hex() +  # mov ecx, TURNS
    "66 49"                                        # dec ecx
    "75 fc"                                        # jnz, to the line before
    "f4"                                           # hlt
)  # fmt: skip


def loop_seconds(kvm: Kvm, longest: float = SLOWEST) -> float | None:
    """How long the loop took, in seconds; None where it was not through after ``longest``. Raises
    KvmError, OSError."""
    with contextlib.ExitStack() as stack:
        ram = Ram(4 * PAGE)
        stack.callback(ram.close)
        machine = VirtualMachine(kvm, ram)
        stack.callback(machine.close)
        vcpu = machine.create_vcpu(0)
        stack.callback(vcpu.close)
        ram.memory.write(_CODE, _LOOP)
        system = vcpu.system_registers()
        system.cs.base = system.cs.selector = 0
        vcpu.set_system_registers(system)
        vcpu.set_registers(KvmRegs(rip=_CODE, rflags=2))
        ended = threading.Event()
        endings: list[Ending] = []

        def end(ending: Ending) -> None:
            endings.append(ending)
            ended.set()

        threads = VcpuThreads([vcpu], ram.memory, Bus(), Bus(), end, name="speed")
        began = time.monotonic()
        threads.start()
        through = ended.wait(longest)
        seconds = time.monotonic() - began
        threads.stop()
        if not threads.join(_JOIN_SECONDS):
            stack.pop_all()  # what it uses can't be taken from under it
            return None
        return seconds if through and endings[0].kind is EndKind.GUEST else None
