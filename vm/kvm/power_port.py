"""The port by which a guest turns its machine off (ACPI 6.5, section 4.8.3.7)."""

from __future__ import annotations

from collections.abc import Callable

from voidbus.vm.devices.bus import Registers
from voidbus.vm.kvm.acpi_tables import SLEEP_ENABLE

PORTS = 2
"""The sleep control register, and the sleep status register behind it."""


class PowerPort(Registers):
    """Calls ``turn_off``, on a vCPU's thread, when the guest says so."""

    def __init__(self, turn_off: Callable[[], None]) -> None:
        self._turn_off = turn_off

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and value & SLEEP_ENABLE:
            self._turn_off()
