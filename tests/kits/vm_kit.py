"""Run specifications for real machines, and what must be left of one."""

from __future__ import annotations

import contextlib
import json
import os
import select
from pathlib import Path

import pytest
from patience import SLOW
from supervisor_kit import Supervisor, processes_of

from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.qemu.machine import QemuMachine

VIRTUAL_MACHINES = (
    pytest.param(QemuMachine, marks=pytest.mark.needs("vm"), id="qemu"),
    pytest.param(KvmMachine, marks=pytest.mark.needs("kvm-hardware", "image"), id="kvm"),
)
"""The kinds of machine in which a guest is a guest, each with what it needs."""

BOOT_PATIENCE = 120.0 * SLOW
"""Seconds for a run in an emulated guest on a busy machine."""


def vm_agent(
    folder: Path, name: str = "agent", *, mode: str, network: bool = False, **env: str
) -> Path:
    """An agent with messaging in a machine, played by claudio, which the environment directs."""
    return _write(
        folder,
        name,
        kind="agent",
        sandbox={"mode": mode, "memory_mb": 256, "network": network, "env": env},
        llm={"provider": "claude"},
        agent={"prompt": "do it", "messaging": {"enabled": True}},
    )


def vm_workflow(
    folder: Path, *steps: tuple[str, str], mode: str, name: str = "flow", **sandbox: object
) -> Path:
    """A workflow of (name, `sh -c` script) in a machine."""
    return _write(
        folder,
        name,
        kind="workflow",
        sandbox={"mode": mode, "memory_mb": 256, **sandbox},
        workflow={
            "steps": [
                {"name": step, "run": {"program": "sh", "args": ["-c", script]}}
                for step, script in steps
            ]
        },
    )


def _write(folder: Path, name: str, **sections: object) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"name": name, **sections}))
    return path


def machine_processes(supervisor: Supervisor) -> list[int]:
    """Pids of the processes that have a machine of a supervisor's runs: QEMUs, and run processes
    with a KVM of their own, which are known by what they hold open. The loop of a few instructions
    by which KVM's speed is found is no machine, and has a few pages."""
    qemus = {pid for pid in processes_of(supervisor.state_dir) if "qemu" in _program(pid)}
    everyone = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    ours = str(supervisor.state_dir)
    holders = {
        pid for pid in everyone if _is_kvm_run(_open_by(pid), ours) and _guest_bytes(pid) > 1 << 20
    }
    return sorted(qemus | holders)


def _open_by(pid: int) -> list[str]:
    """What a process holds open; nothing where it has ended."""
    with contextlib.suppress(OSError):
        return [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    return []


def _is_kvm_run(links: list[str], state_dir: str) -> bool:
    return "anon_inode:kvm-vm" in links and any(link.startswith(state_dir) for link in links)


# Ours and QEMU's; and the kernel and initramfs that are mapped into ours, of which the guest gets
# the pages it writes to.
_GUESTS_OWN = ("memfd:voidbus-guest", "memfd:memory-backend", "/vmlinux", ".cpio")


def guest_memory(pid: int) -> list[tuple[int, int]]:
    """Where a process has its guest's memory: (address, bytes), proc_pid_maps(5)."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if any(name in line for name in _GUESTS_OWN):
            start, end = (int(text, 16) for text in line.split(maxsplit=1)[0].split("-"))
            found.append((start, end - start))
    assert found, f"process {pid} has no guest"
    return found


def _guest_bytes(pid: int) -> int:
    """How much memory a process's guest has; 0 where it has none, or has ended."""
    with contextlib.suppress(OSError, AssertionError):
        return sum(size for _, size in guest_memory(pid))
    return 0


def own_memory() -> int:
    """Resident memory of this process (bytes, proc_pid_smaps(5)) without its guests', of which it
    may be the machine."""
    total, counted = 0, True
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):
            counted = not any(name in line for name in _GUESTS_OWN)
        elif line.startswith("Rss:") and counted:
            total += int(line.split()[1]) * 1024
    return total


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def ends(pid: int, timeout: float) -> bool:
    """Whether a process ends in time; one that is gone already has."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], timeout)[0])
    finally:
        os.close(pidfd)


def leftovers(supervisor: Supervisor, run_id: str) -> list[str]:
    """What a run that ended has left: processes, sockets, and its machine's directory."""
    assert supervisor.process is not None
    folder = supervisor.state_dir / "runs" / run_id
    # os.walk passes over what is being removed meanwhile.
    paths = [
        Path(place, name) for place, folders, files in os.walk(folder) for name in folders + files
    ]
    left = [str(path) for path in paths if path.is_socket() or path.name == "machine"]
    return left + [f"process {pid}" for pid in processes_of(folder)]
