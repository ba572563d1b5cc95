"""Which machine backend a run gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from voidbus.vm.machine import Machine, MachineError
from voidbus.vm.support import Support

_UNISOLATED = "set `sandbox.mode: mock` to run the program as a local process without isolation"


@dataclass(frozen=True)
class Selection:
    """A backend and why it was taken."""

    machine: type[Machine]
    reason: str


def kvm_support() -> Support:
    """What this host offers to a machine on /dev/kvm of our own."""
    from voidbus.vm.kvm.support import kvm_support as examine

    return examine()


def process_support() -> Support:
    """The process machine works everywhere."""
    return Support(
        "process", True, "without isolation: the agent is an ordinary process of this user"
    )


def qemu_support() -> Support:
    """What this host offers to QEMU machines."""
    from voidbus.vm.qemu.support import qemu_support as examine

    return examine()


def select_machine(
    mode: str,
    qemu: Callable[[], Support] = qemu_support,
    kvm: Callable[[], Support] = kvm_support,
) -> Selection:
    """The backend for a run's ``sandbox.mode``. Only ``mock`` gives a machine without
    isolation; nothing falls back to it. ``kvm`` is given to those who ask for it only, until it
    has run as much as QEMU has. Raises MachineError."""
    if mode == "mock":
        from voidbus.vm.process.machine import ProcessMachine

        return Selection(
            ProcessMachine, "sandbox.mode is mock: a local process, without any isolation"
        )
    if mode == "kvm":
        return _select_kvm(kvm())
    if mode not in ("auto", "local", "qemu"):
        raise MachineError(
            f"sandbox.mode {mode!r} is not known; it is auto, local, kvm, qemu or mock"
        )
    support = qemu()
    if not support.works:
        remedy = f": {support.remedy}" if support.remedy else ""
        raise MachineError(
            f"sandbox.mode {mode} needs a virtual machine: {support.detail}{remedy}; "
            f"or {_UNISOLATED}"
        )
    from voidbus.vm.qemu.machine import QemuMachine

    return Selection(QemuMachine, support.detail)


def _select_kvm(support: Support) -> Selection:
    if not support.works:
        remedy = f": {support.remedy}" if support.remedy else ""
        raise MachineError(
            f"sandbox.mode kvm: {support.detail}{remedy}; or set `sandbox.mode: qemu`"
        )
    from voidbus.vm.kvm.machine import KvmMachine

    return Selection(KvmMachine, support.detail)
