"""A directory of the host in a KVM machine: served by our own device, and by virtiofsd.

Floor: none. Peer: virtiofsd behind our front end; QEMU's machine, with our own device.
Reported: bytes a second of a file that is read and one that is written; files a second of a
directory that is listed with all there is to know of them.
Target: half of what virtiofsd does.
How: in turns, medians; each round reads files that no guest has in memory. Needs VT-x or SVM, or
`scripts/kvm-lab bench/run kvm_mounts`, where only ratios mean anything; and virtiofsd, where it is
to be measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

from kit.machines import (
    START_SECONDS,
    execute,
    kvm_machines_work,
    machines_work,
    make,
    new_spec,
)
from kit.measure import interleave, seconds, start_report

from voidbus.vm.channel import GuestChannel
from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.machine import Machine, Mount
from voidbus.vm.qemu.machine import QemuMachine

_FIND = (Path(__file__).parents[1] / "scripts/virtiofsd", "--find")
_MEGABYTE = 1_000_000
_OWNER = 1234


class Guest:
    """A machine and the directory it shares."""

    def __init__(self, channel: GuestChannel, host: Path, *, size: int, files: int) -> None:
        self._channel = channel
        self._host = host
        self._size = size
        self._files = files
        self._round = 0

    def read(self) -> float:
        self._round += 1
        name = f"large{self._round}"
        (self._host / name).write_bytes(os.urandom(self._size * _MEGABYTE))
        return seconds(
            lambda: execute(self._channel, "dd", f"if=/data/{name}", "bs=1M", "of=/dev/null")
        )

    def write(self) -> float:
        words = ("if=/dev/zero", "of=/data/written", f"bs={_MEGABYTE}", f"count={self._size}")
        return seconds(lambda: execute(self._channel, "dd", *words, "conv=fsync"))

    def list(self) -> float:
        self._round += 1
        folder = self._host / f"many{self._round}"
        folder.mkdir()
        for number in range(self._files):
            (folder / str(number)).touch()
        return seconds(lambda: execute(self._channel, "ls", "-l", f"/data/{folder.name}"))


@contextlib.contextmanager
def sharing(
    kind: type[Machine], virtiofsd: Path | None, *, size: int, files: int
) -> Iterator[Guest]:
    with new_spec(kind.name) as spec, tempfile.TemporaryDirectory(prefix="vb-") as folder:
        if os.geteuid() == 0:  # virtiofsd serves no writable directory of root's
            os.chown(folder, _OWNER, _OWNER)
        mounts = (Mount(Path(folder), "/data", writable=True),)
        machine = make(kind, dataclasses.replace(spec, mounts=mounts, virtiofsd=virtiofsd))
        try:
            yield Guest(machine.start(START_SECONDS), Path(folder), size=size, files=files)
        finally:
            machine.close()


def main() -> None:
    report, options = start_report(__file__, __doc__)
    if not kvm_machines_work(report) or not machines_work(report):
        report.write(options.results)
        return
    size, files, rounds = (2, 20, 1) if options.quick else (64, 500, 5)
    told = subprocess.run(_FIND, capture_output=True, text=True, check=False)
    program = Path(told.stdout.strip()) if told.returncode == 0 else None
    with contextlib.ExitStack() as stack:

        def guest(kind: type[Machine], virtiofsd: Path | None = None) -> Guest:
            return stack.enter_context(sharing(kind, virtiofsd, size=size, files=files))

        guests = {"kvm": guest(KvmMachine), "qemu": guest(QemuMachine)}
        if program is None:
            report.leave_out("virtiofsd", "there is none; scripts/virtiofsd gets one")
        else:
            guests["kvm, virtiofsd"] = guest(KvmMachine, program)
        ways: dict[str, tuple[Callable[[Guest], float], float, str]] = {
            "read": (Guest.read, size, "MB/s"),
            "written": (Guest.write, size, "MB/s"),
            "listed": (Guest.list, files, "files/s"),
        }
        for way, (what, amount, unit) in ways.items():
            jobs = {name: partial(what, each) for name, each in guests.items()}
            found = interleave(rounds, jobs, warm=not options.quick)
            for name, values in found.items():
                report.figure(f"{way}, {name}", amount / median(values), unit)
            if program is not None:
                ratio = median(found["kvm, virtiofsd"]) / median(found["kvm"])  # of their times
                report.at_least(f"{way}: times virtiofsd's", ratio, 0.5)
    report.write(options.results)


if __name__ == "__main__":
    main()
