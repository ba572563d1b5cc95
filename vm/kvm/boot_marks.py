"""The register by which a guest tells how far its boot has come."""

from __future__ import annotations

import time

from voidbus.vm.devices.bus import Registers
from voidbus.vm.devices.memory import PAGE
from voidbus.vm.kvm.memory import LOW_END

MARKS_ADDRESS = LOW_END + 0x0FFF_F000
"""Where it is: before the virtio devices, on a page of its own, for a guest's program maps it. A
port would be simpler, but Debian's kernel for clouds has no /dev/port."""
MARKS_BYTES = PAGE

_NAMES = {1: "init", 2: "agent"}
"""What the guest writes (`vm/guest/boot.py`): its first program runs, its agent answers."""


class BootMarks(Registers):
    """Notes when each mark came first (time.monotonic). Any thread may look."""

    def __init__(self) -> None:
        self.moments: dict[str, float] = {}

    def note(self, name: str) -> None:
        """A mark of this side's own."""
        self.moments.setdefault(name, time.monotonic())

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        name = _NAMES.get(value)
        if name is not None:  # else a guest that makes things up
            self.note(name)
