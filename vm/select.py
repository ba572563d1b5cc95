"""Which machine backend a run gets."""

from __future__ import annotations

from dataclasses import dataclass

from voidbus.vm.machine import Machine, MachineError
from voidbus.vm.process.machine import ProcessMachine


@dataclass(frozen=True)
class Selection:
    """A backend and why it was taken."""

    machine: type[Machine]
    reason: str


def select_machine(mode: str) -> Selection:
    """The backend for a run's ``sandbox.mode``. Only ``mock`` gives a machine without
    isolation; nothing falls back to it. Raises MachineError."""
    if mode == "mock":
        return Selection(
            ProcessMachine, "sandbox.mode is mock: a local process, without any isolation"
        )
    if mode in ("auto", "local", "kvm", "qemu"):
        raise MachineError(
            f"sandbox.mode {mode!r} needs a virtual machine, and this release has no backend for "
            "one; set `sandbox.mode: mock` to run the program as a local process without isolation"
        )
    raise MachineError(f"sandbox.mode {mode!r} is not known; it is auto, local, kvm, qemu or mock")
