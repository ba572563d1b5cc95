from __future__ import annotations

from pathlib import Path

import pytest

from voidbus.vm.qemu.acceleration import find_acceleration


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
    assert found.remedy == "sudo modprobe kvm_intel || sudo modprobe kvm_amd"


def test_a_device_that_is_not_kvm_means_emulation(tmp_path: Path, cpuinfo: Path) -> None:
    device = tmp_path / "kvm"
    device.write_bytes(b"")
    found = find_acceleration(device, cpuinfo)
    assert found.name == "tcg"
    assert "does not answer as KVM" in found.reason


@pytest.mark.needs("kvm")
def test_a_processor_that_can_and_a_device_that_answers_mean_kvm(cpuinfo: Path) -> None:
    assert find_acceleration(cpuinfo=cpuinfo).name == "kvm"


def test_a_host_that_tells_nothing_means_emulation(tmp_path: Path) -> None:
    assert find_acceleration(tmp_path / "kvm", tmp_path / "nothing").name == "tcg"
