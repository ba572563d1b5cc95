"""KVM machines whose kernel is a few instructions, so that no boot of Linux is measured."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.machine import Lease, MachineExit, MachineSpec

START_SECONDS = 30.0
_ENTRY = 0x100_0000
# mov dx, 0x600; mov al, 0x34; out dx, al: the sleep control register, off.
TURN_OFF = bytes.fromhex("66 ba 00 06 b0 34 ee eb fe")
# mov edi, 0xcffff000; mov byte [rdi], 1: the register of boot marks; then for ever.
TELL_AND_LOOP = bytes.fromhex("bf 00 f0 ff cf c6 07 01 eb fe")

_LOCAL_APIC, _VECTOR = 0xFEE0_0000, 0x40
_APIC_HERTZ = 1_000_000_000
"""The clock of KVM's local APIC (APIC_BUS_CYCLE_NS in arch/x86/kvm)."""


def tick(hertz: int) -> bytes:
    """A guest that sleeps until its timer wakes it, so often, and then sleeps again. Registers of
    the timer: Intel's manual, volume 3, "Local APIC"."""

    def store(register: int, value: int) -> bytes:  # mov dword [rdi + register], value
        return b"\xc7\x87" + struct.pack("<II", register, value)

    begin = bytes.fromhex("bf 00 f0 ff cf c6 07 01")  # the register of boot marks, as above
    begin += b"\xbf" + struct.pack("<I", _LOCAL_APIC)  # mov edi
    timer = store(0xF0, 0x1FF)  # the APIC is on
    timer += store(0x3E0, 0xB) + store(0x320, 0x2_0000 | _VECTOR)  # undivided, again and again
    timer += store(0x380, _APIC_HERTZ // hertz)
    sleep = bytes.fromhex("fb f4 eb fc")  # sti; hlt; and again
    handler = store(0xB0, 0) + bytes.fromhex("48 cf")  # the interrupt's end; iretq
    load = bytes.fromhex("0f 01 1c 25")  # lidt [address]
    before_handler = len(begin) + len(load) + 4 + len(timer) + len(sleep)
    gates = -(before_handler + len(handler)) // 16 * -16
    at = _ENTRY + before_handler
    gate = struct.pack("<HHBBHII", at & 0xFFFF, 0x10, 0, 0x8E, at >> 16, 0, 0)
    table = gate * (_VECTOR + 1)
    place = struct.pack("<HQ", len(table) - 1, _ENTRY + gates)
    code = begin + load + struct.pack("<I", _ENTRY + gates + len(table)) + timer + sleep + handler
    return code.ljust(gates, b"\0") + table + place


def write_kernel(path: Path, code: bytes) -> Path:
    """An ELF file of one segment."""
    head = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 2, 62, 1, _ENTRY, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    table = struct.pack("<IIQQQQQQ", 1, 5, 120, _ENTRY, _ENTRY, len(code), len(code), 1)
    path.write_bytes(head + table + code)
    return path


class BareKvm(KvmMachine):
    """Starts without waiting for an agent, which there is none of."""

    def __init__(self, spec: MachineSpec) -> None:
        self.ended_at = 0.0
        self._over = threading.Event()
        super().__init__(spec, on_exit=self._note_end, on_lease=_let_be)

    def _note_end(self, _: MachineExit) -> None:
        self.ended_at = time.monotonic()
        self._over.set()

    def launch(self) -> None:
        self._launch(time.monotonic() + START_SECONDS)

    def wait_end(self) -> None:
        if not self._over.wait(START_SECONDS):
            raise TimeoutError("the guest did not turn its machine off")

    def end(self) -> None:
        """Stop it, and free all of it."""
        self.kill()
        self._release()


def _let_be(_: Lease) -> None:
    pass


def until(happened: Callable[[], bool]) -> None:
    """Wait for something that comes in milliseconds."""
    deadline = time.monotonic() + START_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("the guest did not come so far")
        time.sleep(0.0005)
