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
