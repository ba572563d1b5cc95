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
    isolation; nothing falls back to it. Raises MachineError."""
    match mode:
        case "mock":
            from voidbus.vm.process.machine import ProcessMachine

            return Selection(
                ProcessMachine, "sandbox.mode is mock: a local process, without any isolation"
            )
        case "kvm":
            return _kvm(_required(mode, kvm(), "or set `sandbox.mode: qemu`"))
        case "qemu":
            return _qemu(_required(mode, qemu(), f"or {_UNISOLATED}"))
        case "auto" | "local":
            return _best(mode, qemu, kvm())
    raise MachineError(f"sandbox.mode {mode!r} is not known; it is auto, local, kvm, qemu or mock")


def _best(mode: str, qemu: Callable[[], Support], kvm: Support) -> Selection:
    """KVM without QEMU where it works: it starts sooner. Else QEMU, and why it is not the other."""
    if kvm.works:
        return _kvm(kvm)
    other = f"without QEMU it can't run: {kvm.detail}"
    support = _required(mode, qemu(), f"{other}; or {_UNISOLATED}")
    selection = _qemu(support)
    # Both ask for the same accelerator first, and then their reasons are one.
    if kvm.detail in support.detail:
        return selection
    return Selection(selection.machine, f"{support.detail}; {other}")


def _required(mode: str, support: Support, otherwise: str) -> Support:
    """``support``, of a machine that works. Raises MachineError."""
    if support.works:
        return support
    remedy = f": {support.remedy}" if support.remedy else ""
    raise MachineError(
        f"sandbox.mode {mode} needs a virtual machine: {support.detail}{remedy}; {otherwise}"
    )


def _kvm(support: Support) -> Selection:
    from voidbus.vm.kvm.machine import KvmMachine

    return Selection(KvmMachine, support.detail)


def _qemu(support: Support) -> Selection:
    from voidbus.vm.qemu.machine import QemuMachine

    return Selection(QemuMachine, support.detail)
