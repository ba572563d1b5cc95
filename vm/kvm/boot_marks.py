"""The port by which a guest tells how far its boot has come."""

from __future__ import annotations

import time

from voidbus.vm.devices.bus import Registers

MARKS_PORT = 0x610
"""Where it is: beside the sleep registers, where a PC has nothing."""
PORTS = 1

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
