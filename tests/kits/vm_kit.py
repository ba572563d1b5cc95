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


def machines_of(supervisor: Supervisor) -> list[int]:
    """Pids of the processes that have a machine of a supervisor's runs: QEMUs, and run processes
    with a KVM of their own."""
    return [
        pid
        for pid in processes_of(supervisor.state_dir)
        if "qemu" in _program(pid) or _holds_kvm(pid)
    ]


def _holds_kvm(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        entries = Path(f"/proc/{pid}/fd").iterdir()
        return any(str(entry.readlink()) == "anon_inode:kvm-vm" for entry in entries)
    return False


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
