"""A KVM machine of ours with the stock kernel and image, beside QEMU's on the same /dev/kvm.

Floor: QEMU's microvm as voidbus starts it, accelerated. Peer: Firecracker, where one is in PATH.
Reported: from start to the first program's answer, with its steps; exits handled here during a
boot, by cause; round trip of a program; bytes a second in and out, with the vsock of ours and with
the kernel's; CPU and release of an idle machine; private memory of a run's process beside its
guest's.
Target: a start faster than QEMU's; fewer than 2,000 exits; 12 MB of private memory; 0.1 % of a
core and 5 wake-ups a second while idle; 50 ms until everything is released.
How: in turns, medians. What an idle machine uses is the processor time of this process and what it
has started, the guest's own ticks included. Needs VT-x or SVM: on a host without,
`scripts/kvm-lab bench/run kvm_machine` measures in an emulated one, where only ratios mean
anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

from kit.machines import (
    CALL_SECONDS,
    START_SECONDS,
    TimedStart,
    execute,
    kvm_machines_work,
    machines_work,
    make,
    new_spec,
)
from kit.measure import Report, interleave, seconds, start_report
from kit.supervised import SANDBOX, Supervised, descendants
from kit.threads import thread_switches, wake_ups
from peers import firecracker

from voidbus.vm.channel import GuestChannel
from voidbus.vm.devices.vhost_vsock import VHOST_VSOCK
from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.machine import Machine
from voidbus.vm.qemu.machine import QemuMachine

_FILE = "/workspace/bench.bin"
_MEGABYTE = 1_000_000
_STEPS = ("set-up", "kernel", "agent", "handshake", "configure", "first exec")


class TimedKvm(TimedStart, KvmMachine):
    pass


class Starts:
    """What was seen of starts of our machine."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, ...]] = []
        self.exits: Counter[str] = Counter()
        self.releases: list[float] = []

    def ours(self) -> float:
        with new_spec("kvm") as spec:
            machine = make(TimedKvm, spec)
            assert isinstance(machine, TimedKvm)
            try:
                began = time.monotonic()
                execute(machine.start(START_SECONDS), "true")
                ended = time.monotonic()
                self.exits = machine.exits
                moments = [began, *machine.boot_marks.values()]
                moments += [machine.shaken, machine.configured, ended]
                self.steps.append(tuple(b - a for a, b in itertools.pairwise(moments)))
            finally:
                self.releases.append(seconds(machine.close))
        return ended - began


class OtherStarts:
    """Starts of another kind of machine."""

    def __init__(self, kind: type[Machine]) -> None:
        self._kind = kind
        self.releases: list[float] = []

    def start(self) -> float:
        """From a start to the first program's answer."""
        with new_spec(self._kind.name) as spec:
            machine = make(self._kind, spec)
            try:
                return seconds(lambda: execute(machine.start(START_SECONDS), "true"))
            finally:
                self.releases.append(seconds(machine.close))


@contextlib.contextmanager
def running(kind: type[Machine], *, kernel_vsock: bool = False) -> Iterator[GuestChannel]:
    with new_spec(kind.name) as spec:
        machine = make(kind, dataclasses.replace(spec, kernel_vsock=kernel_vsock))
        try:
            yield machine.start(START_SECONDS)
        finally:
            machine.close()


def private_megabytes(pid: int) -> float:
    """Private memory of a process without what is its guest's: pages of mappings of its own.
    Guest memory is a shared memfd, which counts as private while nobody else maps it."""
    total, guest = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name and not name.endswith(":"):
            guest = "memfd:voidbus-guest" in line or "/vmlinux" in line or ".cpio" in line
        elif name in ("Private_Clean:", "Private_Dirty:") and not guest:
            total += int(line.split()[1])
    return total * 1024 / 1e6


def children_seconds() -> float:
    """What the processes have used that this one has started."""
    total = 0
    for pid in descendants(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])  # proc_pid_stat(5)
    return total / os.sysconf("SC_CLK_TCK")


def idle_share(kind: type[Machine], settle: float, watched: float) -> tuple[float, float]:
    """The share of a core that a machine uses which nobody asks anything, and how often a second
    its threads in this process wake."""
    known = set(thread_switches(os.getpid()))
    with running(kind) as channel:
        execute(channel, "true")
        time.sleep(settle)
        # What is read of them takes longer than what they do. So it is read before and after.
        children, before = children_seconds(), thread_switches(os.getpid())
        began, own = time.monotonic(), time.process_time()
        time.sleep(watched)
        own, took = time.process_time() - own, time.monotonic() - began
        after, children = thread_switches(os.getpid()), children_seconds() - children
    return (own + children) / took, wake_ups(before, after, known) / took


def idle(report: Report, settle: float, watched: float) -> None:
    """What a machine costs that nobody asks anything, and a run's process that has one."""
    ours, woken = idle_share(KvmMachine, settle, watched)
    qemus, _ = idle_share(QemuMachine, settle, watched)
    report.at_most("idle machine: wake-ups a second, its processors' among them", woken, 5)
    report.figure("idle machine of QEMU: share of a core", qemus)
    report.at_most("idle machine: share of a core", ours, 0.001)
    report.at_most("idle machine: times QEMU's share", ours / max(qemus, 1e-6), 1.0)
    with tempfile.TemporaryDirectory(prefix="vb-") as folder, Supervised() as supervised:
        file = Path(folder, "vm.yaml")
        file.write_text(SANDBOX.read_text().replace("mode: mock", "mode: kvm"))
        (run_id,) = supervised.start_ready(1, file)
        time.sleep(settle)
        private = private_megabytes(supervised.run_process(run_id))
    report.at_most("a run's process: private memory beside its guest's (MB)", private, 12.0)


def transfers(report: Report, rounds: int, size: int) -> None:
    content = os.urandom(size * _MEGABYTE)
    with contextlib.ExitStack() as stack:
        channels = {
            "kvm": stack.enter_context(running(KvmMachine)),
            "qemu": stack.enter_context(running(QemuMachine)),
        }
        if os.access(VHOST_VSOCK, os.R_OK | os.W_OK):
            kernels = stack.enter_context(running(KvmMachine, kernel_vsock=True))
            channels["kvm, the kernel's vsock"] = kernels
        else:
            report.leave_out("the kernel's vsock", f"{VHOST_VSOCK} is not there")

        def job(what: Callable[[GuestChannel], object]) -> dict[str, Callable[[], float]]:
            return {
                name: partial(seconds, partial(what, channel)) for name, channel in channels.items()
            }

        trips = interleave(rounds * 10, job(lambda channel: execute(channel, "true")))
        for name, values in trips.items():
            report.figure(f"exec, {name}: median", median(values) * 1000, "ms")
        ways: dict[str, Callable[[GuestChannel], object]] = {
            "file in": lambda c: c.write_file(_FILE, content, CALL_SECONDS),
            "file out": lambda c: c.read_file(_FILE, CALL_SECONDS),
        }
        for way, what in ways.items():
            for name, values in interleave(rounds, job(what)).items():
                report.figure(f"{way}, {name}", size / median(values), "MB/s")


def main() -> None:
    report, options = start_report(__file__, __doc__)
    if not kvm_machines_work(report) or not machines_work(report):
        report.write(options.results)
        return
    starts, qemus = Starts(), OtherStarts(QemuMachine)
    rounds = 1 if options.quick else 5
    jobs: dict[str, Callable[[], float]] = {
        "qemu": qemus.start,
        "kvm": starts.ours,
    }
    if firecracker.PROGRAM is not None:
        jobs["firecracker"] = OtherStarts(firecracker.FirecrackerMachine).start
    else:
        report.leave_out("firecracker", "there is none in PATH")
    found = interleave(rounds, jobs, warm=not options.quick)
    for name, taken in found.items():
        report.figure(f"{name}: until the first exec's answer", median(taken), "s")
    for name, values in zip(_STEPS, zip(*starts.steps[-rounds:], strict=True), strict=True):
        report.figure(f"kvm: {name}", median(values) * 1000, "ms")
    for cause, count in starts.exits.most_common():
        report.figure(f"exits of a boot: {cause}", count)
    idle(report, 0.5 if options.quick else 5.0, 1.0 if options.quick else 20.0)
    transfers(report, 1 if options.quick else 5, 1 if options.quick else 16)
    report.at_most("a start: times QEMU's", median(found["kvm"]) / median(found["qemu"]), 1.0)
    if "firecracker" in found:
        ratio = median(found["kvm"]) / median(found["firecracker"])
        report.figure("a start: times Firecracker's", ratio)
    report.at_most("exits of a boot", sum(starts.exits.values()), 2000)
    released = median(starts.releases[-rounds:]) * 1000
    qemu_released = median(qemus.releases[-rounds:]) * 1000
    report.figure("from an idle machine of QEMU to everything released", qemu_released, "ms")
    report.at_most("from an idle machine to everything released, ms", released, 50.0)
    report.at_most("released: times QEMU's", released / qemu_released, 1.0)
    report.write(options.results)


if __name__ == "__main__":
    main()
