"""How fast programs and bytes go to and from a guest.

Floor: the process machine, whose channel is the same protocol on a local stream.
Reported: round trip of the program `true` (median and 99th percentile) and of a question to the
agent, bytes a second of a file in, the file out, and a program's output; each also as a ratio.
Target: a question to a guest takes at most 100 times what it takes without a machine. It is a
bound against regressions under emulation, not a promise.
How: both machines up at once, measured in turns; medians.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import median

from kit.machines import CALL_SECONDS, execute, machines_work, started
from kit.measure import Report, interleave, percentile, seconds, start_report

from voidbus.vm.channel import GuestChannel
from voidbus.vm.process.machine import ProcessMachine
from voidbus.vm.qemu.machine import QemuMachine

Measured = dict[str, list[float]]
"""Seconds, for each machine by its name."""

_FILE = "/workspace/bench.bin"
_MEGABYTE = 1_000_000


def jobs(channel: GuestChannel, content: bytes) -> dict[str, Callable[[], object]]:
    """What is measured; a read and an output need the write before them."""
    return {
        "file in": lambda: channel.write_file(_FILE, content, CALL_SECONDS),
        "file out": lambda: channel.read_file(_FILE, CALL_SECONDS),
        "output": lambda: execute(channel, "cat", _FILE),
    }


def compare(rounds: int, process: Callable[[], object], qemu: Callable[[], object]) -> Measured:
    return interleave(rounds, {"process": lambda: seconds(process), "qemu": lambda: seconds(qemu)})


def show_trip(report: Report, what: str, found: Measured) -> float:
    """Print the figures of a round trip; its ratio."""
    for name, values in found.items():
        report.figure(f"{what}, {name}: median", median(values) * 1000, "ms")
        report.figure(f"{what}, {name}: 99th percentile", percentile(values, 0.99) * 1000, "ms")
    ratio = median(found["qemu"]) / median(found["process"])
    report.figure(f"{what}: times the process machine's", ratio)
    return ratio


def main() -> None:
    report, options = start_report(__file__, __doc__)
    if not machines_work(report):
        report.write(options.results)
        return
    trips, rounds, size = (3, 1, 1) if options.quick else (300, 3, 64)
    content = os.urandom(size * _MEGABYTE)
    with started(ProcessMachine) as process, started(QemuMachine) as qemu:
        execs = compare(trips, lambda: execute(process, "true"), lambda: execute(qemu, "true"))
        show_trip(report, "exec", execs)
        pings = compare(trips, lambda: process.ping(CALL_SECONDS), lambda: qemu.ping(CALL_SECONDS))
        ratio = show_trip(report, "question", pings)
        ours = jobs(qemu, content)
        for name, job in jobs(process, content).items():
            found = compare(rounds, job, ours[name])
            rates = {each: size / median(values) for each, values in found.items()}
            for each, rate in rates.items():
                report.figure(f"{name}, {each}", rate, "MB/s")
            report.figure(f"{name}: of the process machine's", rates["qemu"] / rates["process"])
    report.at_most("question: times the process machine's", ratio, 100.0)
    report.write(options.results)


if __name__ == "__main__":
    main()
