"""A serial port that takes what the guest writes: the registers of a 16450, without a receiver.

Registers are those of the PC16550D data sheet; what is not there reads as on a port with nothing
connected.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from voidbus.vm.devices.bus import Registers

PORTS = 8
"""Ports it takes."""

_DATA, _INTERRUPTS, _IDENTITY, _LINE, _MODEM, _LINE_STATUS, _MODEM_STATUS, _SCRATCH = range(8)
_DIVISOR_LATCH = 1 << 7  # in _LINE: the first two registers are the divisor
_WANTS_EMPTY = 1 << 1  # in _INTERRUPTS
_LOOP = 1 << 4  # in _MODEM
_EMPTY = 0x60  # in _LINE_STATUS: everything written is gone
_CONNECTED = 0xB0  # in _MODEM_STATUS: carrier, data set ready, clear to send
_NO_INTERRUPT, _EMPTY_INTERRUPT = 1, 2  # of _IDENTITY


class SerialPort(Registers):
    """Hands each byte to ``put``; ``interrupt_fd`` is an eventfd of the caller's for its
    line."""

    def __init__(self, put: Callable[[bytes], None], interrupt_fd: int) -> None:
        self._put = put
        self._interrupt_fd = interrupt_fd
        self._lock = threading.Lock()
        self._kept = bytearray(PORTS)
        self._pending = False

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            latched = self._kept[_LINE] & _DIVISOR_LATCH
            match offset:
                case 0:
                    return 0
                case 2:
                    pending, self._pending = self._pending, False
                    return _EMPTY_INTERRUPT if pending else _NO_INTERRUPT
                case 5:
                    return _EMPTY
                case 6:
                    return self._modem_status()
                case 1 if latched:
                    return 0
            return self._kept[offset]

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        with self._lock:
            latched = self._kept[_LINE] & _DIVISOR_LATCH
            if offset <= _INTERRUPTS and latched:
                return
            if offset == _DATA:
                if not self._kept[_MODEM] & _LOOP:
                    self._put(bytes([value]))
            elif offset in (_IDENTITY, _LINE_STATUS, _MODEM_STATUS):
                return
            else:
                self._kept[offset] = value
            if offset <= _INTERRUPTS and self._kept[_INTERRUPTS] & _WANTS_EMPTY:
                self._pending = True
                with suppress(BlockingIOError):  # full: told often enough
                    os.eventfd_write(self._interrupt_fd, 1)

    def _modem_status(self) -> int:
        modem = self._kept[_MODEM]
        if not modem & _LOOP:
            return _CONNECTED
        # Looped back: its own outputs, in the order DTR, RTS, OUT1, OUT2 to DSR, CTS, RI, DCD.
        return (modem & 1) << 5 | (modem & 2) << 3 | (modem & 4) << 4 | (modem & 8) << 4
