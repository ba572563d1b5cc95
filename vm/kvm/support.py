"""Whether machines on `/dev/kvm` of our own work on this host."""

from __future__ import annotations

import platform
from collections.abc import Callable

from voidbus.vm.acceleration import Acceleration, find_acceleration
from voidbus.vm.kvm.system import Kvm, KvmUnavailable
from voidbus.vm.support import Support

ARCHITECTURE = "x86_64"
"""The one processor guest images are built for."""


def kvm_support(
    acceleration: Callable[[], Acceleration] = find_acceleration,
    machine: str = platform.machine(),
    opened: Callable[[], Kvm] = Kvm,
) -> Support:
    """What this host offers to ``KvmMachine``: it needs VT-x or SVM, as no stock kernel gets
    anywhere on a KVM that emulates."""
    if machine != ARCHITECTURE:
        return Support("kvm", False, f"guest images are for {ARCHITECTURE}, this is {machine}")
    found = acceleration()
    if found.name != "kvm":
        reason = found.reason.removeprefix("emulated: ")
        return Support("kvm", False, reason, found.remedy)
    try:
        opened().close()
    except KvmUnavailable as error:
        return Support("kvm", False, str(error))
    return Support("kvm", True, found.reason)
