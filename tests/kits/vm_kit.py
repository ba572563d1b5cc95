"""Run specifications for real machines, and what must be left of one."""

from __future__ import annotations

import json
import os
import select
from pathlib import Path

from patience import SLOW
from supervisor_kit import Supervisor, processes_of

BOOT_PATIENCE = 120.0 * SLOW
"""Seconds for a run in an emulated guest on a busy machine."""


def vm_agent(
    folder: Path, name: str = "agent", *, mode: str = "qemu", network: bool = False, **env: str
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
    folder: Path, *steps: tuple[str, str], name: str = "flow", **sandbox: object
) -> Path:
    """A workflow of (name, `sh -c` script) in a machine."""
    return _write(
        folder,
        name,
        kind="workflow",
        sandbox={"mode": "qemu", "memory_mb": 256, **sandbox},
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


def qemus_of(supervisor: Supervisor) -> list[int]:
    """Pids of the QEMU processes of a supervisor's runs."""
    return [pid for pid in processes_of(supervisor.state_dir) if "qemu" in _program(pid)]


def parent_of(pid: int) -> int:
    """The parent of a process: of a QEMU, its run process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


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
    left = [str(path) for path in folder.rglob("*") if path.is_socket() or path.name == "machine"]
    return left + [f"process {pid}" for pid in processes_of(folder)]
