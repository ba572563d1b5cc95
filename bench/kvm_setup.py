"""What a machine of KVM costs around its guest: set-up, release, and while the guest sleeps.

Floor: none; interrupt controllers in the kernel and split ones stand side by side.
Reported: from the call to the guest's first instruction, for a machine of 512 MB; from the kill of
a busy guest until everything is released; making and closing the bare machine, both ways; processor
time of a guest that sleeps but for its timer.
Target: the first instruction in 5 ms, everything released in 50 ms, 0.1 % of a core while idle.
How: kernels of some instructions on this host's /dev/kvm, which may be one that only emulates; in
a warm process, medians. The idle guest wakes 5 times a second and does nothing: what is measured
is what waking it costs here. The stock one wakes less often (`kvm_machine` counts it, and what it
does then, where it runs).
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from kit.bare_kvm import (
    TELL_AND_LOOP,
    TURN_OFF,
    BareKvm,
    tick,
    until,
    write_kernel,
)
from kit.machines import new_spec
from kit.measure import interleave, start_report
from kit.threads import thread_switches, wake_ups

from voidbus.vm.image.cpio import directory, write_archive
from voidbus.vm.kvm.memory import Ram
from voidbus.vm.kvm.system import KVM_DEVICE, Kvm
from voidbus.vm.kvm.virtual_machine import VirtualMachine

MEMORY_MB = 512
SETTLE_SECONDS = 0.5
WAKE_UPS = 5


def set_up(kernel: Path, initramfs: Path) -> float:
    """Seconds until the guest's first instructions have turned the machine off."""
    with new_spec("bare") as spec:
        machine = BareKvm(
            dataclasses.replace(spec, kernel=kernel, initramfs=initramfs, memory_mb=MEMORY_MB)
        )
        try:
            began = time.monotonic()
            machine.launch()
            machine.wait_end()
        finally:
            machine.end()
        return machine.ended_at - began


def release(kernel: Path, initramfs: Path) -> float:
    """Seconds from the kill of a guest in an endless loop until nothing of it is left."""
    with new_spec("bare") as spec:
        machine = BareKvm(
            dataclasses.replace(spec, kernel=kernel, initramfs=initramfs, memory_mb=MEMORY_MB)
        )
        machine.launch()
        until(lambda: "init" in machine.boot_marks)
        began = time.monotonic()
        machine.end()
        return time.monotonic() - began


def bare(*, split: bool) -> float:
    """Seconds to make and close a machine with one vCPU."""
    kvm = Kvm()
    ram = Ram(MEMORY_MB << 20)
    try:
        began = time.monotonic()
        machine = VirtualMachine(kvm, ram)
        machine.create_interrupt_controllers(split=split)
        machine.create_vcpu(0).close()
        machine.close()
        return time.monotonic() - began
    finally:
        ram.close()
        kvm.close()


def idle(kernel: Path, initramfs: Path, watched: float) -> tuple[float, float]:
    """The share of a core that a guest uses which only its timer wakes, and its wake-ups a
    second."""
    with new_spec("bare") as spec:
        known = set(thread_switches(os.getpid()))
        machine = BareKvm(
            dataclasses.replace(spec, kernel=kernel, initramfs=initramfs, memory_mb=MEMORY_MB)
        )
        machine.launch()
        try:
            until(lambda: "init" in machine.boot_marks)
            time.sleep(SETTLE_SECONDS)
            before = thread_switches(os.getpid())
            began, used = time.monotonic(), time.process_time()
            time.sleep(watched)
            used, took = time.process_time() - used, time.monotonic() - began
            return used / took, wake_ups(before, thread_switches(os.getpid()), known) / took
        finally:
            machine.end()


def main() -> None:
    report, options = start_report(__file__, __doc__)
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        report.leave_out("machines of KVM", f"{KVM_DEVICE} is not there or not to be opened")
        report.write(options.results)
        return
    rounds = 2 if options.quick else 50
    with tempfile.TemporaryDirectory(prefix="vb-") as name:
        initramfs = Path(name, "initramfs.cpio")
        with initramfs.open("wb") as file:
            write_archive([directory("dev")], file)
        quick = write_kernel(Path(name, "turn-off"), TURN_OFF)
        busy = write_kernel(Path(name, "loop"), TELL_AND_LOOP)
        jobs: dict[str, Callable[[], float]] = {
            "set-up": lambda: set_up(quick, initramfs),
            "release": lambda: release(busy, initramfs),
            "in the kernel": lambda: bare(split=False),
            "split": lambda: bare(split=True),
        }
        ticking = write_kernel(Path(name, "tick"), tick(WAKE_UPS))
        share, woken = idle(ticking, initramfs, 1.0 if options.quick else 20.0)
        found = {each: median(s) * 1000 for each, s in interleave(rounds, jobs).items()}
    for way in ("in the kernel", "split"):
        report.figure(f"interrupt controllers {way}: make and close", found[way], "ms")
    report.at_most("until the guest's first instruction, ms", found["set-up"], 5.0)
    report.at_most("from a busy guest to everything released, ms", found["release"], 50.0)
    report.figure("an idle guest: wake-ups a second", woken)
    report.at_most("an idle guest: share of a core", share, 0.001)
    report.write(options.results)


if __name__ == "__main__":
    main()
