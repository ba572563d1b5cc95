"""What a run with an idle virtual machine costs the host.

Floor: none; QEMU's own memory and wake-ups stand beside for reference.
Reported: private and resident memory of the run's process and of QEMU, and wake-ups a second of
each thread of the run's process, with what it waits in. Beside it wake-ups of the threads of a
machine that nobody samples: what is left then would be ours, and not the guest's.
Target: the run's process adds at most 25 MB of private memory; an idle machine wakes no thread.
How: a real supervisor and a run with a QEMU machine. Memory from /proc/PID/smaps_rollup, wake-ups
as voluntary context switches over 10 seconds (proc_pid_status(5)), what a thread waits in from
/proc/PID/task/TID/wchan. Telemetry samples as it does for every run.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from at_rest import observe, show
from kit.machines import execute, machines_work, started
from kit.measure import start_report
from kit.supervised import SANDBOX, Supervised, command_line, descendants
from kit.threads import thread_switches, wake_ups

from voidbus.vm.qemu.machine import QemuMachine


def waits_in(pid: int, thread: int) -> str:
    """The kernel function it waits in ("0": it runs, or the host does not tell)."""
    try:
        return Path(f"/proc/{pid}/task/{thread}/wchan").read_text() or "0"
    except OSError:
        return "0"


def idle_machine(settle: float, watched: float) -> float:
    """Wake-ups a second of all threads of a machine in this process that nobody asks anything."""
    before_it = set(thread_switches(os.getpid()))
    with started(QemuMachine) as channel:
        execute(channel, "true")
        time.sleep(settle)
        before, began = thread_switches(os.getpid()), time.monotonic()
        time.sleep(watched)
        after, took = thread_switches(os.getpid()), time.monotonic() - began
    return wake_ups(before, after, before_it) / took


def main() -> None:
    report, options = start_report(__file__, __doc__)
    if not machines_work(report):
        report.write(options.results)
        return
    watched, settle = (1.0, 0.5) if options.quick else (10.0, 5.0)
    with tempfile.TemporaryDirectory(prefix="vb-") as folder, Supervised() as supervised:
        file = Path(folder, "vm.yaml")
        file.write_text(SANDBOX.read_text().replace("mode: mock", "mode: qemu"))
        (run_id,) = supervised.start_ready(1, file)
        run = supervised.run_process(run_id)
        qemu = next(pid for pid in descendants(run) if b"qemu-system" in command_line(pid))
        time.sleep(settle)
        before, began = thread_switches(run), time.monotonic()
        usages = observe([run, qemu], watched)
        after, took = thread_switches(run), time.monotonic() - began
        rates = {tid: (after[tid] - before.get(tid, 0)) / took for tid in after}
        waits = {tid: waits_in(run, tid) for tid in rates}
    alone = idle_machine(settle, watched)
    show(report, "the run's process", usages[run])
    show(report, "QEMU", usages[qemu])
    for tid, rate in sorted(rates.items()):
        who = "main thread" if tid == run else f"thread {tid - run:+d}"
        report.figure(f"{who}, in {waits[tid]}: wake-ups a second", rate)
    report.at_most("the run's process: private memory (MB)", usages[run].private, 25.0)
    report.at_most("a machine nobody samples: wake-ups a second of all its threads", alone, 0.1)
    report.write(options.results)


if __name__ == "__main__":
    main()
