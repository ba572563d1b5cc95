"""Capabilities: a test names what it needs of the machine, and is skipped, saying so, without it.

`VOIDBUS_REQUIRE=root,mount` turns the skips for those capabilities into failures, so that a machine
that is meant to have them can't lose them unseen; `all` stands for every one.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No supervisor of a test takes the place where the user's clients look for one.
os.environ["VOIDBUS_API__LISTEN"] = "off"

NOBODY = 65534


def _can_mount() -> bool:
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
        if subprocess.run(command, check=False, capture_output=True, timeout=10).returncode:
            return False
        subprocess.run(["umount", folder], check=True, timeout=10)
    return True


def _counts_disk_traffic() -> bool:
    """Whether what is written where temporary files lie is in /proc/PID/io; on a tmpfs it isn't."""

    def written() -> int:
        return int(re.findall(r"^write_bytes: (\d+)", io.read_text(), re.MULTILINE)[0])

    io = Path("/proc/self/io")
    if not io.exists():
        return False
    before = written()
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(bytes(65536))
        os.fsync(file.fileno())
    return written() > before


def _has_image() -> bool:
    from voidbus.vm.image.store import ImageError, default_store

    try:
        default_store().current()
    except ImageError:
        return False
    return True


def _has_packages() -> bool:
    from voidbus.vm.image.build import choose_packages
    from voidbus.vm.image.recipe import BASE
    from voidbus.vm.image.store import ImageError, default_store

    try:
        kernel, others = choose_packages(BASE)
        folder = default_store().packages
    except ImageError:
        return False
    there = all((folder / package.file_name).exists() for package in (kernel, *others))
    return there and shutil.which("dpkg-deb") is not None


def _can_be_another_user() -> bool:
    """Whether this process may become another user, who may read this checkout."""
    try:
        looked = subprocess.run(
            ["test", "-r", __file__],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            check=False,
            timeout=10,
        )
    except OSError:
        return False
    return looked.returncode == 0


def _has_qemu() -> bool:
    from voidbus.vm.qemu.support import qemu_support

    return qemu_support().works


def _has_passt() -> bool:
    from voidbus.vm.network.user_network import available

    return available() is None


def _has_mcp_sdk() -> bool:
    from mcp_sdk import SDK_VERSIONS, sdk_python

    return all(sdk_python(version) for version in SDK_VERSIONS)


def _has_name_server() -> bool:
    """Whether the host's first name server has an IPv4 address."""
    try:
        lines = Path("/etc/resolv.conf").read_text().splitlines()
    except OSError:
        return False
    servers = [line.split()[1] for line in lines if line.startswith("nameserver ")]
    return bool(servers) and ":" not in servers[0]


def _has_claude() -> bool:
    from npm_agents import claude_program

    return claude_program() is not None


def _has_codex() -> bool:
    from npm_agents import codex_program

    return codex_program() is not None


def _has_virtiofsd() -> bool:
    from virtiofsd import virtiofsd

    return virtiofsd() is not None


def _has_kvm_hardware() -> bool:
    from voidbus.vm.acceleration import find_acceleration

    return find_acceleration().name == "kvm"


def _has_kvm_headers() -> bool:
    return Path("/usr/include/linux/kvm.h").exists() and shutil.which("cc") is not None


CAPABILITIES: dict[str, Callable[[], bool]] = {
    "root": lambda: os.geteuid() == 0,
    "mount": _can_mount,
    "other-user": _can_be_another_user,
    "disk": _counts_disk_traffic,
    "image": _has_image,
    "packages": _has_packages,
    "qemu": _has_qemu,
    "vm": lambda: _has_qemu() and _has_image(),
    "passt": _has_passt,
    "socat": lambda: shutil.which("socat") is not None,
    "squashfs": lambda: shutil.which("mksquashfs") is not None,
    "mcp-sdk": _has_mcp_sdk,
    "cpio": lambda: shutil.which("cpio") is not None,
    "nameserver": _has_name_server,
    "claude": _has_claude,
    "codex": _has_codex,
    "kvm": lambda: os.access("/dev/kvm", os.R_OK | os.W_OK),
    "kvm-hardware": _has_kvm_hardware,
    "kvm-headers": _has_kvm_headers,
    "vhost-vsock": lambda: os.access("/dev/vhost-vsock", os.R_OK | os.W_OK),
    "virtiofsd": _has_virtiofsd,
    "iasl": lambda: shutil.which("iasl") is not None,
}


@cache
def has(capability: str) -> bool:
    return CAPABILITIES[capability]()


def pytest_configure() -> None:
    """Hear Ctrl-C, which shells have background jobs ignore: what tests start would inherit that.

    Without it `scripts/test &` in a script fails every test that interrupts a command.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # How long an example takes depends on the machines that boot beside it.
    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what boots machines of its own, which takes minutes where they are slow."""
    for item in items:
        if not isinstance(item, pytest.Function) or not hasattr(item.cls, "machine_type"):
            continue
        if "make" in item.fixturenames:
            item.add_marker("own_boot")


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = set(os.environ.get("VOIDBUS_REQUIRE", "").split(","))
    for marker in item.iter_markers("needs"):
        for capability in marker.args:
            if capability not in CAPABILITIES:
                pytest.fail(f"unknown capability {capability!r}; known: {sorted(CAPABILITIES)}")
            if has(capability):
                continue
            if required & {capability, "all"}:
                pytest.fail(f"VOIDBUS_REQUIRE names {capability}, which this machine lacks")
            pytest.skip(f"needs capability: {capability}")
