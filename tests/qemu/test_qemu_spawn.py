"""Starting QEMU where the host has run out of something, and what is left then."""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from voidbus.vm.machine import Lease, MachineError, MachineExit, MachineSpec
from voidbus.vm.qemu import machine as machine_module
from voidbus.vm.qemu.devices import Devices
from voidbus.vm.qemu.machine import QemuMachine
from voidbus.vm.qemu.process import spawn
from voidbus.vm.qemu.user import QemuUser

pytestmark = [pytest.mark.needs("vm"), pytest.mark.timeout(60)]

WAIT = 20.0


class Machine:
    """A machine and what it reported."""

    def __init__(self, folder: Path) -> None:
        self.exits: list[MachineExit] = []
        self.leases: list[Lease] = []
        spec = MachineSpec("r", "m0", folder, secrets.token_bytes(32), memory_mb=256)
        self.machine = QemuMachine(spec, on_exit=self.exits.append, on_lease=self.leases.append)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    made.machine.close()


def descriptors() -> set[str]:
    """What this process has open, by number and what it is."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def test_a_spawn_that_hangs_ends_at_the_starts_deadline(
    made: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(
        arguments: Sequence[str],
        folder: Path,
        inherited: tuple[int, ...],
        errors: int,
        user: QemuUser | None,
    ) -> subprocess.Popen[bytes]:
        entered.set()
        assert go_on.wait(WAIT)
        return spawn(arguments, folder, inherited, errors, user)

    monkeypatch.setattr(machine_module, "spawn", slow)
    before = descriptors()
    began = time.monotonic()
    with pytest.raises(MachineError, match="was not started in time"):
        made.machine.start(0.2)
    assert entered.is_set()
    assert time.monotonic() - began < WAIT
    go_on.set()
    made.machine.close()
    # The QEMU that came late was killed, and nothing is left of it.
    (lease,) = made.leases
    assert not Path(f"/proc/{lease.pid}").exists()
    assert [ended.reason for ended in made.exits] == ["stopped"]
    assert descriptors() <= before


@pytest.mark.parametrize("room", range(12))
def test_a_process_without_descriptors_says_so_and_keeps_none(made: Machine, room: int) -> None:
    folder = made.machine.spec.scratch
    devices = Devices(made.machine.spec, on_failed=lambda _: None, on_lease=made.leases.append)
    made.machine._devices = devices
    devices.start(time.monotonic() + WAIT)
    before = descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    top = max(int(name.split()[0]) for name in before)
    fillers = [os.open(folder, os.O_PATH) for _ in range(top)]  # so that only the end is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fillers) + 1 + room, hard))
    try:
        with pytest.raises(MachineError, match=r"could not be started: .*Too many open files"):
            made.machine._spawn("/bin/false", devices, time.monotonic() + WAIT)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fillers:
            os.close(fd)
    made.machine.close()
    assert descriptors() <= before
    assert made.leases == []
    assert made.exits == []
