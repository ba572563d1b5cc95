"""Whether QEMU machines work on this host."""

from __future__ import annotations

import platform
from collections.abc import Callable

from voidbus.vm.acceleration import Acceleration, find_acceleration
from voidbus.vm.qemu.process import INSTALL, PROGRAM, find_program
from voidbus.vm.support import Support

ARCHITECTURE = "x86_64"
"""The one processor guest images are built for."""


def qemu_support(
    find: Callable[[str], str | None] = find_program,
    acceleration: Callable[[], Acceleration] = find_acceleration,
    machine: str = platform.machine(),
) -> Support:
    """What this host offers to ``QemuMachine``."""
    if machine != ARCHITECTURE:
        return Support("qemu", False, f"guest images are for {ARCHITECTURE}, this is {machine}")
    program = find(PROGRAM)
    if program is None:
        return Support("qemu", False, f"{PROGRAM} is not installed", INSTALL)
    if find("setpriv") is None:
        return Support("qemu", False, "setpriv is missing", "sudo apt-get install util-linux")
    found = acceleration()
    return Support("qemu", True, found.reason, found.remedy)
