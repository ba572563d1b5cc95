"""What a supervisor and an idle run cost while nothing happens.

Floor: a Python process that has imported zmq, pydantic and aiohttp and sleeps.
Reported: private memory (what the process alone adds: Private_Clean + Private_Dirty), resident and
proportional memory, threads, and wake-ups a second, of the supervisor with no run and with 100, and
of an idle run's process, beside the floor.
Targets: an idle run's process wakes at most twice a second (its guest is sampled once a second) and
adds at most the floor's private memory (it shares the zygote's pages); a supervisor wakes at most
3 times a second without runs, and at most twice a second for each run (it samples each once).
How: memory from /proc/PID/smaps_rollup, wake-ups as voluntary context switches of all its threads
over 10 seconds (proc_pid_status(5)). ZeroMQ's own threads are among them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from kit.measure import Report, start_report
from kit.supervised import PATIENCE, Supervised, descendants
from kit.threads import thread_switches

FLOOR = (
    "import sys; import zmq, pydantic, aiohttp; context = zmq.Context(); "
    "context.socket(zmq.DEALER); print('up', flush=True); sys.stdin.read()"
)


@dataclass(frozen=True)
class Usage:
    """One process: megabytes, threads, voluntary context switches a second."""

    private: float
    resident: float
    proportional: float
    threads: int
    wakes: float


def memory(pid: int) -> dict[str, float]:
    """smaps_rollup in megabytes (proc_pid_smaps(5))."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024 / 1e6
    return found


def observe(pids: list[int], seconds: float) -> dict[int, Usage]:
    """Watch processes for some seconds without touching them."""
    before = {pid: sum(thread_switches(pid).values()) for pid in pids}
    start = time.monotonic()
    time.sleep(seconds)
    took = time.monotonic() - start
    found = {}
    for pid in pids:
        after = thread_switches(pid)
        sizes = memory(pid)
        found[pid] = Usage(
            sizes["Private_Clean"] + sizes["Private_Dirty"],
            sizes["Rss"],
            sizes["Pss"],
            len(after),
            (sum(after.values()) - before[pid]) / took,
        )
    return found


def typical(usages: list[Usage]) -> Usage:
    """The median of each."""
    return Usage(
        median(usage.private for usage in usages),
        median(usage.resident for usage in usages),
        median(usage.proportional for usage in usages),
        round(median(usage.threads for usage in usages)),
        median(usage.wakes for usage in usages),
    )


def show(report: Report, who: str, usage: Usage) -> None:
    report.figure(f"{who}: private memory", usage.private, "MB")
    report.figure(f"{who}: resident", usage.resident, "MB")
    report.figure(f"{who}: proportional", usage.proportional, "MB")
    report.figure(f"{who}: threads", usage.threads)
    report.figure(f"{who}: wake-ups a second", usage.wakes)


def main() -> None:
    report, options = start_report(__file__, __doc__)
    count, seconds, settle = (2, 1.0, 0.5) if options.quick else (100, 10.0, 3.0)
    with (
        subprocess.Popen(
            [sys.executable, "-P", "-c", FLOOR], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as floor,
        Supervised() as supervised,
    ):
        assert floor.stdout is not None
        floor.stdout.readline()
        zygote = supervised.zygote()
        pid = supervised.process.pid
        time.sleep(settle)
        empty = observe([pid, zygote, floor.pid], seconds)
        runs = [supervised.run_process(run_id) for run_id in supervised.start_ready(count)]
        guests = [guest for run in runs for guest in descendants(run)]
        time.sleep(settle)
        full = observe([pid, zygote, *runs, *guests], seconds)
        floor.communicate(timeout=PATIENCE)
    bare, idle = empty[floor.pid], typical([full[run] for run in runs])
    show(report, "floor: Python with zmq, pydantic, aiohttp", bare)
    show(report, "supervisor, no run", empty[pid])
    show(report, f"supervisor, {count} runs", full[pid])
    show(report, "zygote", full[zygote])
    show(report, "an idle run's process, median", idle)
    show(report, "its mock guest's agent, median", typical([full[guest] for guest in guests]))
    each = (full[pid].private - empty[pid].private) / count
    report.figure("supervisor: private memory for each run", each * 1000, "kB")
    report.at_most("supervisor, no run: wake-ups a second", empty[pid].wakes, 3.0)
    shared = (full[pid].wakes - empty[pid].wakes) / count
    report.at_most("supervisor: wake-ups a second for each run", shared, 2.0)
    report.at_most("an idle run's process, median: wake-ups a second", idle.wakes, 2.0)
    ratio = idle.private / bare.private
    report.at_most("an idle run's process: private memory to the floor's", ratio, 1.0)
    report.write(options.results)


if __name__ == "__main__":
    main()
