"""Whole runs whose guests reach the host through its kernel: `machines.kernel_vsock`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from patience import SLOW
from supervisor_kit import Client, Supervisor, running_supervisor
from vm_kit import BOOT_PATIENCE, leftovers, machine_processes, vm_agent, vm_workflow

from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.messages.sidecar import IntentList, ReadIntents
from voidbus.cli.event_line import log_text

pytestmark = [
    pytest.mark.needs("kvm-hardware", "vhost-vsock", "image"),
    pytest.mark.timeout(300 * SLOW),
]


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with running_supervisor(VOIDBUS_MACHINES__KERNEL_VSOCK="true") as running:
        yield running


def test_an_agent_reports_to_its_leader(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(vm_agent(tmp_path, mode="kvm", CLAUDIO_TURNS="1", CLAUDIO_INTENTS="2"))
    client.wait_for(run_id, lambda event: event.event_type == "machine.started", BOOT_PATIENCE)
    folder = supervisor.state_dir / "runs" / run_id
    assert list(folder.rglob("vsock.sock*")) == [], "that would be ours"
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
    intents = client.ask("runs", ReadIntents(run_id=run_id))
    assert isinstance(intents, IntentList)
    assert [intent.audience for intent in intents.intents] == ["broadcast", "leader"]
    assert leftovers(supervisor, run_id) == []


def test_a_cancelled_run_leaves_nothing(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(vm_workflow(tmp_path, ("wait", "echo up; sleep 600"), mode="kvm"))
    client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    client.cancel(run_id, grace=5)
    assert client.wait_end(run_id, BOOT_PATIENCE).status == RunStatus.CANCELLED
    assert machine_processes(supervisor) == []
    assert leftovers(supervisor, run_id) == []
