"""How long a virtual machine takes from start to the first program's answer.

Floor: the same QEMU, kernel, initramfs, devices and kernel command line, executed directly, until
its guest agent answers a handshake; asked every 2 ms. Preparing its devices is not counted.
Reported: the machine's time in steps, and once, on the floor, kernel and agent apart.
Target: what is ours takes at most a tenth: (ours - floor) / ours, both until the handshake.
How: floor and machine in turns; medians. The two apart by the moments their lines stand on the
console, with all kernel lines shown (`loglevel=7`), which slows the boot: a share, not a time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from kit.machines import (
    START_SECONDS,
    PlainQemu,
    TimedStart,
    execute,
    machines_work,
    make,
    new_spec,
)
from kit.measure import interleave, start_report

from voidbus.vm.acceleration import find_acceleration
from voidbus.vm.qemu.devices import Devices
from voidbus.vm.qemu.host_clock import counter_khz
from voidbus.vm.qemu.machine import QemuMachine


class TimedMachine(TimedStart, QemuMachine):
    """Also when it was prepared and spawned."""

    prepared = spawned = 0.0

    def _spawn(self, program: str, devices: Devices, deadline: float) -> None:
        self.prepared = time.monotonic()
        super()._spawn(program, devices, deadline)
        self.spawned = time.monotonic()


@dataclass(frozen=True)
class Start:
    """One start, in seconds."""

    prepare: float
    spawn: float
    handshake: float
    configure: float
    first_exec: float

    @property
    def until_handshake(self) -> float:
        return self.prepare + self.spawn + self.handshake

    @property
    def total(self) -> float:
        return self.until_handshake + self.configure + self.first_exec


def start_machine() -> Start:
    with new_spec("timed") as spec:
        machine = make(TimedMachine, spec)
        assert isinstance(machine, TimedMachine)
        try:
            began = time.monotonic()
            channel = machine.start(START_SECONDS)
            execute(channel, "true")
            ended = time.monotonic()
        finally:
            machine.close()
    return Start(
        machine.prepared - began,
        machine.spawned - machine.prepared,
        machine.shaken - machine.spawned,
        machine.configured - machine.shaken,
        ended - machine.configured,
    )


def start_plain() -> float:
    with new_spec("plain") as spec, PlainQemu(spec) as plain:
        began = plain.spawn()
        return plain.wait_for_agent() - began


def kernel_share() -> float:
    """The part of a boot before the agent's first instruction."""
    with new_spec("shown") as spec, PlainQemu(spec, kernel_words=" loglevel=7") as plain:
        began = plain.spawn()
        init, serving = plain.wait_for_lines("Run /init", "] serving")
    return (init - began) / (serving - began)


def main() -> None:
    report, options = start_report(__file__, __doc__)
    if not machines_work(report):
        report.write(options.results)
        return
    counter_khz()  # 20 ms, once a process; so no start pays it
    rounds = 1 if options.quick else 7
    starts: list[Start] = []

    def ours() -> float:
        starts.append(start_machine())
        return starts[-1].until_handshake

    found = interleave(rounds, {"plain": start_plain, "ours": ours}, warm=not options.quick)
    starts = starts[-rounds:]
    report.figure("acceleration", find_acceleration().name)
    report.figure("plain QEMU: until the handshake", median(found["plain"]), "s")
    report.figure("machine: until the handshake", median(found["ours"]), "s")
    report.figure("machine: prepare devices", median(s.prepare for s in starts) * 1000, "ms")
    report.figure("machine: spawn QEMU", median(s.spawn for s in starts) * 1000, "ms")
    report.figure("machine: boot and handshake", median(s.handshake for s in starts), "s")
    report.figure("machine: configure", median(s.configure for s in starts) * 1000, "ms")
    report.figure("machine: first exec", median(s.first_exec for s in starts) * 1000, "ms")
    report.figure("machine: until the first exec's answer", median(s.total for s in starts), "s")
    if not options.quick:
        report.figure("kernel's share of boot, all its lines shown", kernel_share())
    shares = [(o - p) / o for o, p in zip(found["ours"], found["plain"], strict=True)]
    report.figure("our share, lowest and highest", f"{min(shares):.3f} {max(shares):.3f}")
    report.at_most(
        "our share of a start",
        (median(found["ours"]) - median(found["plain"])) / median(found["ours"]),
        0.1,
    )
    report.write(options.results)


if __name__ == "__main__":
    main()
