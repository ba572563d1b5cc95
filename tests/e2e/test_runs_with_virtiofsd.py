"""Whole runs whose directories virtiofsd serves: `machines.virtiofsd`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import SLOW
from supervisor_kit import Client, Supervisor, running_supervisor
from virtiofsd import owned_directory, virtiofsd
from vm_kit import BOOT_PATIENCE, ends, leftovers, machine_processes, vm_workflow

from voidbus.actors.messages.runs import RunStatus
from voidbus.cli.event_line import log_text

pytestmark = [
    pytest.mark.needs("kvm-hardware", "virtiofsd", "image"),
    pytest.mark.timeout(300 * SLOW),
]


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with running_supervisor(VOIDBUS_MACHINES__VIRTIOFSD=str(virtiofsd())) as running:
        yield running


def serving(folder: Path) -> set[int]:
    """Pids of the virtiofsds that serve a directory."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if os.fsencode(folder) in words and words[0].endswith(b"virtiofsd"):
                found.add(int(entry.name))
    return found


@pytest.fixture
def wanted() -> Iterator[Path]:
    with owned_directory() as made:
        yield made


def test_a_run_reads_and_writes_its_directories(
    supervisor: Supervisor, client: Client, tmp_path: Path, wanted: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "in.txt").write_text("from the host")
    script = "cp /data/in.txt /out/out.txt && ! touch /data/no 2>/dev/null && echo up && sleep 600"
    mounts = [
        {"host": str(given), "guest": "/data"},
        {"host": str(wanted), "guest": "/out", "mode": "rw"},
    ]
    run_id = client.start(vm_workflow(tmp_path, ("copy", script), mode="kvm", mounts=mounts))
    client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    assert (wanted / "out.txt").read_text() == "from the host"
    assert len(serving(given)) == len(serving(wanted)) == 2, "it, and it in its namespaces"
    client.cancel(run_id, grace=5)
    assert client.wait_end(run_id, BOOT_PATIENCE).status == RunStatus.CANCELLED
    assert serving(given) | serving(wanted) == set()
    assert machine_processes(supervisor) == []
    assert leftovers(supervisor, run_id) == []


def test_a_run_process_that_is_killed_leaves_no_virtiofsd(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    mounts = [{"host": str(tmp_path), "guest": "/data"}]
    spec = vm_workflow(tmp_path, ("wait", "echo up; sleep 600"), mode="kvm", mounts=mounts)
    run_id = client.start(spec)
    client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    served = serving(tmp_path)
    assert served
    run_process = client.state(run_id).run_process
    assert run_process is not None
    os.kill(run_process, signal.SIGKILL)
    assert client.wait_end(run_id, BOOT_PATIENCE).status == RunStatus.FAILED
    assert all(ends(pid, 30) for pid in served)
