"""What a machine on `/dev/kvm` can't have is refused before anything runs, and nothing is left."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine_kit import START_WAIT, Guest, MakeGuest, machines_of

from voidbus.vm.image.store import default_store
from voidbus.vm.kvm.guest_devices import MAX_DEVICES
from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.machine import MachineError, Mount

pytestmark = pytest.mark.needs("kvm", "image")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeGuest]:
    with machines_of(KvmMachine, tmp_path) as make:
        yield make


def long_mounts(folder: Path, count: int) -> tuple[Mount, ...]:
    """Directories of the host that have long paths in the guest."""
    folder.mkdir()
    return tuple(
        Mount(folder, f"/data/{'a-rather-long-name-for-a-directory' * 4}/{number}")
        for number in range(count)
    )


def refused(guest: Guest, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        guest.machine.start(START_WAIT)
    assert guest.leases == []
    assert guest.exits == []


def test_too_little_memory(make: MakeGuest) -> None:
    refused(make(memory_mb=16), "memory")


def test_more_processors_than_there_are_ids_for(make: MakeGuest) -> None:
    refused(make(vcpus=255), r"255 processors; set sandbox\.vcpus to \d+ at most")


def test_an_image_that_is_not_there(make: MakeGuest, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    refused(make(kernel=nothing, initramfs=nothing), "nothing")


def test_a_mounted_directory_that_is_not_there(make: MakeGuest, tmp_path: Path) -> None:
    refused(make(mounts=(Mount(tmp_path / "nowhere", "/data"),)), "nowhere")


def test_one_mount_too_many(make: MakeGuest, tmp_path: Path) -> None:
    mounts = long_mounts(tmp_path / "given", MAX_DEVICES - 2)
    refused(make(mounts=mounts), "20 devices, but a machine has room for 19; mount")


@pytest.mark.parametrize("which", range(1, 13))
def test_descriptors_that_run_out_at_any_device(
    make: MakeGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    numbers, real = itertools.count(1), os.eventfd

    def eventfd(initial: int, flags: int) -> int:
        if next(numbers) == which:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(initial, flags)

    guest = make(mounts=(Mount(tmp_path, "/data"),))
    monkeypatch.setattr(os, "eventfd", eventfd)
    refused(guest, "it could not be made: .*Too many open files")


def test_a_line_that_is_too_long_for_a_guest_of_others(make: MakeGuest, tmp_path: Path) -> None:
    image = default_store().current()
    mounts = long_mounts(tmp_path / "given", 12)
    guest = make(mounts=mounts, kernel=image.kernel, initramfs=image.initramfs)
    refused(guest, r"line of \d+ bytes is too long; use fewer mounts")
