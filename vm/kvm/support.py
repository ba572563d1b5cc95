"""Whether machines on `/dev/kvm` of our own work on this host."""

from __future__ import annotations

import platform
from collections.abc import Callable

from voidbus.vm.kvm.calls import KvmError
from voidbus.vm.kvm.speed import SLOWEST, TURNS, loop_seconds
from voidbus.vm.kvm.system import Kvm, KvmUnavailable
from voidbus.vm.qemu.acceleration import Acceleration, find_acceleration
from voidbus.vm.support import Support

ARCHITECTURE = "x86_64"
"""The one processor guest images are built for."""


def kvm_support(
    acceleration: Callable[[], Acceleration] = find_acceleration,
    machine: str = platform.machine(),
    opened: Callable[[], Kvm] = Kvm,
    speed: Callable[[Kvm], float | None] = loop_seconds,
) -> Support:
    """What this host offers to ``KvmMachine``: it needs VT-x or SVM, as no stock kernel gets
    anywhere on a KVM that emulates; and guests that are quick, which is tried."""
    if machine != ARCHITECTURE:
        return Support("kvm", False, f"guest images are for {ARCHITECTURE}, this is {machine}")
    found = acceleration()
    if found.name != "kvm":
        reason = found.reason.removeprefix("emulated: ")
        return Support("kvm", False, reason, found.remedy)
    try:
        kvm = opened()
        try:
            seconds = speed(kvm)
        finally:
            kvm.close()
    except (KvmUnavailable, KvmError) as error:
        return Support("kvm", False, str(error))
    except (OSError, RuntimeError) as error:
        return Support("kvm", False, f"its speed could not be tried: {error}")
    if seconds is None:
        return Support(
            "kvm",
            False,
            f"guests are too slow on /dev/kvm: {TURNS:,} turns of a loop took more than "
            f"{SLOWEST:g} s, so what this host runs on may emulate its processor",
            "use a host with hardware virtualisation of its own",
        )
    return Support("kvm", True, found.reason)
