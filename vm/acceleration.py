"""Whether this host's processor can run guests, and so which accelerator QEMU gets.

A `/dev/kvm` alone says little: without VT-x or SVM it is an emulator in the kernel, too slow for
a stock kernel and lacking instructions it needs. So the processor is asked first. Nor do its flags
say all: what this host runs on may emulate what they name. So guests' speed is tried.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from voidbus.vm.kvm.calls import CREATE_VM, GET_API_VERSION, KvmError
from voidbus.vm.kvm.speed import SLOWEST, TURNS, loop_seconds
from voidbus.vm.kvm.system import API_VERSION, KVM_DEVICE, Kvm, KvmUnavailable

_FLAGS = ("vmx", "svm")


@dataclass(frozen=True)
class Acceleration:
    """QEMU's accelerator, "kvm" or "tcg"; why; and what would make it better, if anything."""

    name: str
    reason: str
    remedy: str | None = None


def _loop_seconds(device: Path) -> float | None:
    with contextlib.closing(Kvm(device)) as kvm:
        return loop_seconds(kvm)


def find_acceleration(
    device: Path = KVM_DEVICE,
    cpuinfo: Path = Path("/proc/cpuinfo"),
    speed: Callable[[Path], float | None] = _loop_seconds,
) -> Acceleration:
    """What works here. Never raises: where it can't tell, emulation works everywhere."""
    flag = _virtualisation_flag(cpuinfo)
    if flag is None:
        there = f"{device} is there but emulated in software" if device.exists() else "no KVM"
        return Acceleration(
            "tcg",
            f"emulated: the processor offers neither VT-x nor SVM ({there})",
            "use a host with hardware virtualisation, or allow nested virtualisation on its host",
        )
    trouble = _trouble(device, flag) or _slowness(device, speed)
    if trouble is None:
        return Acceleration("kvm", f"accelerated by {device} ({flag})")
    return trouble


def _virtualisation_flag(cpuinfo: Path) -> str | None:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("flags"):
            flags = line.partition(":")[2].split()
            return next((flag for flag in _FLAGS if flag in flags), None)
    return None


def _trouble(device: Path, flag: str) -> Acceleration | None:
    """Why a processor that can is of no use, and what to do; None where all is well."""
    module = "kvm_intel" if flag == "vmx" else "kvm_amd"
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _emulated(f"there is no {device}", f"sudo modprobe {module}")
    except OSError as error:
        return _emulated(
            f"{device} can't be opened: {error.strerror}",
            "sudo usermod -aG kvm $USER (and log in again)",
        )
    try:
        return _answers(device, fd)
    finally:
        os.close(fd)


def _answers(device: Path, fd: int) -> Acceleration | None:
    try:
        version = fcntl.ioctl(fd, GET_API_VERSION.number, 0)
    except OSError as error:
        return _emulated(f"{device} does not answer as KVM: {error.strerror}")
    if version != API_VERSION:
        return _emulated(f"{device} speaks API version {version}, not {API_VERSION}")
    try:
        # It may answer and not be had: another hypervisor has the processor, say.
        os.close(fcntl.ioctl(fd, CREATE_VM.number, 0))
    except OSError as error:
        return _emulated(
            f"{device} makes no machine: {error.strerror}",
            "end what else uses the processor's virtualisation: another hypervisor",
        )
    return None


def _slowness(device: Path, speed: Callable[[Path], float | None]) -> Acceleration | None:
    """That guests are too slow on it, if they are."""
    try:
        seconds = speed(device)
    except (KvmUnavailable, KvmError, OSError, RuntimeError) as error:
        return _emulated(f"how fast guests are on {device} could not be tried: {error}")
    if seconds is not None:
        return None
    return _emulated(
        f"guests are slow on {device}: {TURNS:,} turns of a loop took more than {SLOWEST:g} s, so "
        "what this host runs on may emulate its processor",
        "use a host with hardware virtualisation of its own",
    )


def _emulated(problem: str, remedy: str | None = None) -> Acceleration:
    return Acceleration("tcg", f"emulated: {problem}", remedy)
