"""How fast the processor's time-stamp counter runs.

An emulated guest reads the host's counter (QEMU target/i386, ``cpu_get_tsc``) and has nothing
but the PIT to learn its rate from. On a busy host that fails, and a stock kernel then hangs
without a clock: 12 boots of 12 with five processes on two cores. So the host measures the rate
and says it on the kernel's command line (``tsc_early_khz``).
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from functools import cache

# rdtsc; shl rdx, 32; or rax, rdx; ret (Intel SDM volume 2: RDTSC gives edx:eax).
_READ_COUNTER = bytes.fromhex("0f3148c1e2204809d0c3")

_MEASURE_SECONDS = 0.02
_TRIES = 16


@cache
def counter_khz() -> int | None:
    """Kilohertz of the time-stamp counter, within some 100 ppm; None where it can't be measured.
    Takes 20 ms, once a process."""
    try:
        memory = mmap.mmap(
            -1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
        )
    except OSError:  # a host that forbids it (SELinux execmem)
        return None
    memory.write(_READ_COUNTER)
    anchor = ctypes.c_char.from_buffer(memory)
    counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
    first, began = _reading(counter)
    threading.Event().wait(_MEASURE_SECONDS)
    last, ended = _reading(counter)
    del counter, anchor
    memory.close()
    return round((last - first) * 1_000_000 / (ended - began)) if ended > began else None


def _reading(counter: ctypes._FuncPointer) -> tuple[int, int]:
    """The counter, and the time in nanoseconds: of several readings the least disturbed."""
    best: tuple[int, int, int] | None = None
    for _ in range(_TRIES):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        value = int(counter())
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best is None or after - before < best[0]:
            best = (after - before, value, (before + after) // 2)
    assert best is not None
    return best[1], best[2]
