from __future__ import annotations

import pytest

from voidbus.vm.acceleration import Acceleration
from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.machine import MachineError
from voidbus.vm.process.machine import ProcessMachine
from voidbus.vm.qemu.machine import QemuMachine
from voidbus.vm.qemu.support import qemu_support
from voidbus.vm.select import select_machine
from voidbus.vm.support import Support

WORKS = Support("qemu", True, "accelerated by /dev/kvm (svm)")
EMULATED = Support("qemu", True, "emulated: there is no /dev/kvm")
MISSING = Support("qemu", False, "qemu-system-x86_64 is not installed", "sudo apt-get install it")
KVM = Support("kvm", True, "accelerated by /dev/kvm (svm)")
NO_KVM = Support("kvm", False, "there is no /dev/kvm", "sudo modprobe kvm_amd")


def test_mock_is_a_process_whatever_else_works() -> None:
    assert select_machine("mock", lambda: WORKS, lambda: KVM).machine is ProcessMachine


@pytest.mark.parametrize("mode", ["auto", "local"])
def test_kvm_without_qemu_is_preferred_where_it_works(mode: str) -> None:
    selection = select_machine(mode, lambda: WORKS, lambda: KVM)
    assert (selection.machine, selection.reason) == (KvmMachine, KVM.detail)
    assert select_machine(mode, lambda: MISSING, lambda: KVM).machine is KvmMachine


@pytest.mark.parametrize("mode", ["auto", "local"])
def test_qemu_is_taken_where_kvm_does_not_work_and_the_reason_is_told_once(mode: str) -> None:
    selection = select_machine(mode, lambda: EMULATED, lambda: NO_KVM)
    assert (selection.machine, selection.reason) == (QemuMachine, EMULATED.detail)


def test_why_kvm_was_passed_over_is_told_where_it_is_not_qemus_reason_too() -> None:
    lacking = Support("kvm", False, "/dev/kvm lacks KVM_CAP_IRQFD")
    selection = select_machine("auto", lambda: WORKS, lambda: lacking)
    assert selection.machine is QemuMachine
    assert selection.reason == (
        f"{WORKS.detail}; without QEMU it can't run: /dev/kvm lacks KVM_CAP_IRQFD"
    )


def test_qemu_is_taken_where_it_is_asked_for_whatever_else_works() -> None:
    selection = select_machine("qemu", lambda: WORKS, lambda: KVM)
    assert (selection.machine, selection.reason) == (QemuMachine, WORKS.detail)


@pytest.mark.parametrize("mode", ["auto", "local", "qemu"])
def test_nothing_falls_back_to_a_process_by_itself(mode: str) -> None:
    with pytest.raises(MachineError) as caught:
        select_machine(mode, lambda: MISSING, lambda: NO_KVM)
    text = str(caught.value)
    assert "is not installed: sudo apt-get install it" in text
    assert ("there is no /dev/kvm" in text) == (mode != "qemu")
    assert "sandbox.mode: mock" in text


def test_an_unknown_mode_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(MachineError, match="auto, local, kvm, qemu or mock"):
        select_machine("other", lambda: WORKS, lambda: KVM)


def test_a_kvm_machine_that_is_asked_for_needs_no_qemu() -> None:
    selection = select_machine("kvm", lambda: MISSING, lambda: KVM)
    assert (selection.machine, selection.reason) == (KvmMachine, KVM.detail)


def test_where_no_kvm_machine_works_it_is_told_what_to_use_instead() -> None:
    with pytest.raises(MachineError) as caught:
        select_machine("kvm", lambda: WORKS, lambda: NO_KVM)
    assert str(caught.value) == (
        "sandbox.mode kvm needs a virtual machine: there is no /dev/kvm: sudo modprobe kvm_amd; "
        "or set `sandbox.mode: qemu`"
    )


def test_qemu_works_where_it_is_installed_and_says_how_well() -> None:
    slow = Acceleration("tcg", "emulated: no KVM", "use another host")
    support = qemu_support(lambda name: f"/usr/bin/{name}", lambda: slow, "x86_64")
    assert support.works
    assert support.detail == "emulated: no KVM"
    assert support.remedy == "use another host"


@pytest.mark.parametrize("missing", ["qemu-system-x86_64", "setpriv"])
def test_what_qemu_machines_lack_is_named_with_the_command_that_brings_it(missing: str) -> None:
    fast = Acceleration("kvm", "accelerated")
    support = qemu_support(
        lambda name: None if name == missing else f"/usr/bin/{name}", lambda: fast, "x86_64"
    )
    assert not support.works
    assert missing in support.detail
    assert support.remedy is not None
    assert support.remedy.startswith("sudo apt-get install")


def test_a_processor_without_guest_images_is_told() -> None:
    fast = Acceleration("kvm", "accelerated")
    assert not qemu_support(lambda name: f"/usr/bin/{name}", lambda: fast, "aarch64").works
