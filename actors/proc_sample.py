"""What a process uses, from /proc (proc(5)): resident memory, processor time, disk traffic."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from voidbus.actors.messages.telemetry import HostSample
from voidbus.actors.runtime.process import ProcessGoneError, ProcessIdentity, parse_stat

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class ProcessSampler:
    """Samples one process; the CPU share is over the time since the sample before."""

    identity: ProcessIdentity
    _cpu_ticks: int = -1
    _at: float = 0.0

    def sample(self, now: float) -> HostSample:
        """Raises ProcessGoneError when it has ended, or its pid is another's."""
        folder = Path("/proc") / str(self.identity.pid)
        try:
            stat = (folder / "stat").read_bytes()
            statm = (folder / "statm").read_bytes()
        except OSError:
            raise ProcessGoneError(f"process {self.identity} is gone") from None
        if parse_stat(stat).identity != self.identity:
            raise ProcessGoneError(f"process {self.identity} is gone; its pid was given away")
        resident = int(statm.split()[1])
        if not resident:  # it has ended, and nobody has waited for it yet
            raise ProcessGoneError(f"process {self.identity} has ended")
        # Fields 14 and 15, counted after the name, which may hold spaces and parentheses.
        fields = stat.rpartition(b")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        elapsed = now - self._at
        known = self._cpu_ticks >= 0 and elapsed > 0
        percent = 100.0 * (ticks - self._cpu_ticks) / _TICKS / elapsed if known else 0.0
        self._cpu_ticks, self._at = ticks, now
        read, written = _disk_traffic(folder)
        return HostSample(
            rss_bytes=resident * _PAGE,
            cpu_percent=round(max(0.0, percent), 2),
            io_read_bytes=read,
            io_write_bytes=written,
        )


def _disk_traffic(folder: Path) -> tuple[int, int]:
    try:
        lines = (folder / "io").read_text().splitlines()
    except OSError:  # another user's process, or a kernel without task I/O accounting
        return 0, 0
    fields = dict(line.split(": ", 1) for line in lines if ": " in line)
    return int(fields.get("read_bytes", 0)), int(fields.get("write_bytes", 0))
