"""What the machine and its processes use, read from /proc."""

from __future__ import annotations

import os
import time

from .descendants import descendants, process_ids, stat_fields
from .telemetry_messages import ProcessUsage, SystemUsage, TelemetryBatch

MIN_INTERVAL_MS = 100
"""The shortest interval a host gets (protocol, "Telemetry")."""

MAX_PROCESSES = 4096
"""Most processes in one batch, so that a fork bomb does not become a giant message."""


class Telemetry:
    """Takes samples. ``below`` limits the processes to those under that process (the process
    machine counts only its own); None means the whole machine."""

    def __init__(self, below: int | None) -> None:
        self._below = below
        self._seq = 0
        self._page = os.sysconf("SC_PAGE_SIZE")
        self._last = _cpu_times()

    def sample(self, *, include_kernel_threads: bool = False) -> TelemetryBatch:
        """One batch; ``cpu_percent`` covers the time since the batch before."""
        processes = self._processes(include_kernel_threads)
        busy, total = _cpu_times()
        busy_before, total_before = self._last
        self._last = (busy, total)
        span = max(1, total - total_before)
        percent = 100.0 * max(0, busy - busy_before) / span
        memory_total, memory_free = _memory()
        received, sent = _traffic("eth0")
        system = SystemUsage(
            round(percent, 2),
            memory_total - memory_free,
            memory_total,
            received,
            sent,
            sum(process.state == "R" for process in processes),
            sum(_open_files(process.pid) for process in processes),
        )
        batch = TelemetryBatch(self._seq, time.time_ns() // 1_000_000, system, processes)
        self._seq += 1
        return batch

    def _processes(self, include_kernel_threads: bool) -> tuple[ProcessUsage, ...]:
        pids = process_ids() if self._below is None else list(descendants(self._below))
        found: list[ProcessUsage] = []
        for pid in pids[:MAX_PROCESSES]:
            try:
                if not include_kernel_threads and not _read(f"/proc/{pid}/cmdline"):
                    continue
                fields = stat_fields(pid)
                comm = _read(f"/proc/{pid}/comm").decode(errors="replace").rstrip("\n")
                found.append(
                    ProcessUsage(
                        pid,
                        comm,
                        int(fields[21]) * self._page,  # rss, field 24 of proc_pid_stat(5)
                        int(fields[11]) + int(fields[12]),  # utime and stime, 14 and 15
                        fields[0].decode(),
                    )
                )
            except (OSError, IndexError, ValueError):
                continue  # it ended meanwhile
        return tuple(found)


def _cpu_times() -> tuple[int, int]:
    """Busy and total jiffies since boot (proc_stat(5), line ``cpu``)."""
    try:
        values = [int(text) for text in _read("/proc/stat").split(b"\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return sum(values) - sum(values[3:5]), sum(values)


def _memory() -> tuple[int, int]:
    sizes = {b"MemTotal": 0, b"MemAvailable": 0}
    try:
        for line in _read("/proc/meminfo").splitlines():
            name, _, rest = line.partition(b":")
            if name in sizes:
                sizes[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        return 0, 0
    return sizes[b"MemTotal"], sizes[b"MemAvailable"]


def _traffic(interface: str) -> tuple[int, int]:
    folder = f"/sys/class/net/{interface}/statistics"
    try:
        return int(_read(f"{folder}/rx_bytes")), int(_read(f"{folder}/tx_bytes"))
    except (OSError, ValueError):
        return 0, 0


def _open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - speed
    except OSError:
        return 0


def _read(path: str) -> bytes:
    """The start of a file of the kernel's. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 65536)
    finally:
        os.close(fd)
