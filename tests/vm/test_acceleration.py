from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fuse_kit import open_descriptors

from voidbus.vm.acceleration import Acceleration, find_acceleration
from voidbus.vm.kvm import calls
from voidbus.vm.kvm.calls import KvmError
from voidbus.vm.machine import MachineSpec
from voidbus.vm.qemu import devices
from voidbus.vm.qemu.command import Layout, command
from voidbus.vm.qemu.support import qemu_support


def probe(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    flags: str,
    version: int = 12,
    error: int | None = None,
    speed: Callable[[Path], float | None] = lambda _: 0.002,
) -> Acceleration:
    """What is found on a host whose processor has these flags and whose KVM says this version, and
    makes a machine unless there is an error; `speed` is of its guests."""

    def ioctl(_fd: int, request: int, _argument: int) -> int:
        if request == 0xAE00:
            return version
        assert request == 0xAE01
        if error is not None:
            raise OSError(error, os.strerror(error))
        return os.dup(_fd)

    (folder / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    (folder / "kvm").touch()
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return find_acceleration(folder / "kvm", folder / "cpuinfo", speed)


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nflags\t\t: fpu vme svm sse\n")
    return path


def test_a_processor_without_vt_x_and_svm_means_emulation_whatever_devices_there_are(
    tmp_path: Path,
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: fpu vme sse\n")
    device = tmp_path / "kvm"
    device.touch()
    found = find_acceleration(device, cpuinfo)
    assert found.name == "tcg"
    assert "neither VT-x nor SVM" in found.reason
    assert "emulated in software" in found.reason
    assert found.remedy is not None


def test_a_missing_device_means_emulation_and_names_the_module(
    tmp_path: Path, cpuinfo: Path
) -> None:
    found = find_acceleration(tmp_path / "kvm", cpuinfo)
    assert found.name == "tcg"
    assert found.remedy == "sudo modprobe kvm_amd"


def test_a_device_that_is_not_kvm_means_emulation(tmp_path: Path, cpuinfo: Path) -> None:
    device = tmp_path / "kvm"
    device.write_bytes(b"")
    found = find_acceleration(device, cpuinfo)
    assert found.name == "tcg"
    assert "does not answer as KVM" in found.reason


@pytest.mark.needs("kvm")
def test_a_processor_that_can_and_a_device_that_answers_mean_kvm(cpuinfo: Path) -> None:
    assert find_acceleration(cpuinfo=cpuinfo, speed=lambda _: 0.002).name == "kvm"


@pytest.mark.needs("kvm")
def test_flags_whose_guests_are_slow_all_the_same_mean_emulation(cpuinfo: Path) -> None:
    found = find_acceleration(cpuinfo=cpuinfo, speed=lambda _: None)
    assert (found.name, found.remedy) == (
        "tcg",
        "use a host with hardware virtualisation of its own",
    )
    assert "3,000,000 turns of a loop took more than 0.5 s" in found.reason


def test_a_speed_that_can_not_be_tried_means_emulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Path) -> float:
        raise KvmError(calls.CREATE_VCPU, "", errno.ENOMEM)

    found = probe(tmp_path, monkeypatch, flags="svm", speed=broken)
    assert found.name == "tcg"
    assert "could not be tried: KVM_CREATE_VCPU, to make a vCPU, failed" in found.reason


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_a_processor_that_can_and_a_device_that_answers_mean_kvm_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    found = probe(tmp_path, monkeypatch, flags=f"fpu {flag} sse")
    assert found == Acceleration("kvm", f"accelerated by {tmp_path / 'kvm'} ({flag})")


def test_a_device_of_another_version_means_emulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probe(tmp_path, monkeypatch, flags="svm", version=11)
    assert (found.name, found.reason) == (
        "tcg",
        f"emulated: {tmp_path / 'kvm'} speaks API version 11, not 12",
    )


def test_a_device_that_may_not_be_opened_means_emulation_and_names_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if str(path) == str(tmp_path / "kvm") and flags & os.O_RDWR and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    found = probe(tmp_path, monkeypatch, flags="vmx")
    assert found.name == "tcg"
    assert "can't be opened: Permission denied" in found.reason
    assert found.remedy is not None
    assert "kvm" in found.remedy


def test_a_device_that_makes_no_machine_means_emulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_descriptors()
    found = probe(tmp_path, monkeypatch, flags="vmx", error=errno.EBUSY)
    assert found.name == "tcg"
    assert found.reason.endswith("kvm makes no machine: Device or resource busy")
    assert found.remedy == "end what else uses the processor's virtualisation: another hypervisor"
    assert probe(tmp_path, monkeypatch, flags="vmx").name == "kvm"
    assert open_descriptors() == before


def test_a_word_that_only_begins_like_the_flag_is_not_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert probe(tmp_path, monkeypatch, flags="vmx_fake asvm").name == "tcg"


@pytest.mark.parametrize(
    ("flags", "name", "words"),
    [
        ("fpu vmx", "kvm", ("-accel kvm", "-cpu host")),
        ("fpu", "tcg", ("-accel tcg,thread=multi", "-cpu max")),
    ],
)
def test_the_probe_decides_what_qemu_is_told_and_the_reason_is_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str,
    name: str,
    words: tuple[str, ...],
) -> None:
    found = probe(tmp_path, monkeypatch, flags=flags)
    assert found.name == name
    support = qemu_support(find=lambda program: f"/usr/bin/{program}", acceleration=lambda: found)
    assert (support.works, support.detail) == (True, found.reason)
    monkeypatch.setattr(devices, "find_acceleration", lambda: found)
    spec = MachineSpec("r", "m", tmp_path, bytes(32))
    made = devices.Devices(spec, on_failed=lambda _: None, on_lease=lambda _: None)
    layout = Layout(
        name="r",
        program="qemu",
        acceleration=made.acceleration,
        memory_mb=256,
        vcpus=1,
        kernel=3,
        initramfs=4,
        monitor=5,
        serial=6,
        config=7,
        vhost_user=(),
    )
    line = " ".join(command(layout))
    assert all(word in line for word in words)
    made.close()


def test_kvm_measures_no_clock_for_its_guests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has KVM's own; an emulated one is told the rate of the counter."""
    for flags, told in (("vmx", False), ("fpu", True)):
        found = probe(tmp_path, monkeypatch, flags=flags)
        monkeypatch.setattr(devices, "find_acceleration", lambda found=found: found)
        monkeypatch.setattr(devices, "counter_khz", lambda: 1_000_000)
        spec = MachineSpec("r", "m", tmp_path, bytes(32))
        made = devices.Devices(spec, on_failed=lambda _: None, on_lease=lambda _: None)
        made._add_clock()
        assert ("tsc_early_khz=1000000" in made.kernel_line) == told
        made.close()


def test_a_host_that_tells_nothing_means_emulation(tmp_path: Path) -> None:
    assert find_acceleration(tmp_path / "kvm", tmp_path / "nothing").name == "tcg"
