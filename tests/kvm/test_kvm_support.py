"""Where machines on `/dev/kvm` work, and what is said where they don't."""

from __future__ import annotations

import contextlib
import threading

import pytest
from fuse_kit import open_descriptors

from voidbus.vm.acceleration import Acceleration
from voidbus.vm.kvm.speed import loop_seconds
from voidbus.vm.kvm.support import kvm_support
from voidbus.vm.kvm.system import Kvm, KvmUnavailable

HARDWARE = Acceleration("kvm", "accelerated by /dev/kvm (svm)")
SOFTWARE = Acceleration("tcg", "emulated: the processor offers neither VT-x nor SVM", "elsewhere")


def unavailable() -> Kvm:
    raise KvmUnavailable("/dev/kvm lacks KVM_CAP_IRQFD")


@pytest.mark.needs("kvm")
def test_they_work_with_hardware_virtualisation() -> None:
    support = kvm_support(lambda: HARDWARE, "x86_64")
    assert (support.machine, support.works, support.detail) == ("kvm", True, HARDWARE.reason)


def test_without_it_the_processor_s_lack_is_told_with_what_helps() -> None:
    support = kvm_support(lambda: SOFTWARE, "x86_64", unavailable)
    assert not support.works
    assert support.detail == "the processor offers neither VT-x nor SVM"
    assert support.remedy == "elsewhere"


def test_a_kvm_that_lacks_something_is_told() -> None:
    support = kvm_support(lambda: HARDWARE, "x86_64", unavailable)
    assert (support.works, support.detail) == (False, "/dev/kvm lacks KVM_CAP_IRQFD")


def test_a_processor_without_guest_images_is_told() -> None:
    assert "this is aarch64" in kvm_support(lambda: HARDWARE, "aarch64", unavailable).detail


@pytest.mark.needs("kvm-hardware")
def test_the_loop_is_quick_where_the_processor_runs_it() -> None:
    with contextlib.closing(Kvm()) as kvm:
        assert loop_seconds(kvm) is not None


@pytest.mark.needs("kvm")
def test_a_loop_that_takes_too_long_is_given_up_and_leaves_nothing() -> None:
    before = set(threading.enumerate()), open_descriptors()
    with contextlib.closing(Kvm()) as kvm:
        assert loop_seconds(kvm, 0.0) is None
    assert (set(threading.enumerate()), open_descriptors()) == before
