"""What answers at ports and at addresses that are no memory."""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections import Counter


class Registers(ABC):
    """A device's registers. Called on whatever vCPU's thread the guest uses, several at once.

    An access has 1, 2, 4 or 8 bytes (ports: 1, 2 or 4), any offset within the device, and
    whatever value the guest likes. A DeviceError ends the machine.
    """

    @abstractmethod
    def read(self, offset: int, size: int) -> int:
        """The value of ``size`` bytes at ``offset``; more bits than that are cut off."""

    @abstractmethod
    def write(self, offset: int, size: int, value: int) -> None: ...


class Bus:
    """Devices by address. Where there is none, reads give all ones and writes go nowhere, as on a
    PC. Devices are added before anything runs."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._devices: list[tuple[int, Registers, str]] = []
        self.accesses: Counter[str] = Counter()
        """How often each device was asked, by name; "nothing" for all else. Written without a
        lock, for whoever measures."""

    def add(self, start: int, size: int, device: Registers, name: str) -> None:
        """Raises ValueError where another is already."""
        at = bisect.bisect(self._starts, start)
        before = self._devices[at - 1][0] if at else 0
        if before > start or (at < len(self._starts) and start + size > self._starts[at]):
            raise ValueError(f"two devices at {start:#x}")
        self._starts.insert(at, start)
        self._devices.insert(at, (start + size, device, name))

    def read(self, address: int, size: int) -> int:
        """Raises DeviceError."""
        found = self._find(address, size)
        return -1 if found is None else found[0].read(address - found[1], size)

    def write(self, address: int, size: int, value: int) -> None:
        """Raises DeviceError."""
        found = self._find(address, size)
        if found is not None:
            found[0].write(address - found[1], size, value)

    def _find(self, address: int, size: int) -> tuple[Registers, int] | None:
        at = bisect.bisect(self._starts, address) - 1
        if at >= 0:
            end, device, name = self._devices[at]
            if address + size <= end:
                self.accesses[name] += 1
                return device, self._starts[at]
        self.accesses["nothing"] += 1
        return None
