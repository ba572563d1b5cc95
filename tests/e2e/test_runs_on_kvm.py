"""Whole runs in machines of KVM without QEMU, through a real supervisor."""

from __future__ import annotations

from pathlib import Path

import pytest
from patience import SLOW
from supervisor_kit import Client, Supervisor, kill, running_supervisor
from vm_kit import BOOT_PATIENCE, ends, leftovers, qemus_of, vm_agent, vm_workflow

from voidbus.actors.messages.runs import RunStatus
from voidbus.actors.messages.sidecar import IntentList, PutInbox, ReadIntents, SidecarState
from voidbus.cli.event_line import log_text
from voidbus.sidecar.model import InboxEntry, InboxSnapshot

pytestmark = [pytest.mark.needs("kvm-hardware", "image"), pytest.mark.timeout(400 * SLOW)]

ENDS_SECONDS = 20.0 * SLOW


def up(client: Client, folder: Path, script: str = "echo up; sleep 600") -> tuple[str, int]:
    """A run whose program has begun, and the pid of its process, which is also the machine's."""
    run_id = client.start(vm_workflow(folder, ("wait", script), mode="kvm"))
    client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    process = client.state(run_id).run_process
    assert process is not None
    return run_id, process


@pytest.mark.parametrize(
    "network", [False, pytest.param(True, marks=pytest.mark.needs("passt"))], ids=["vsock", "card"]
)
def test_an_agent_reads_its_inbox_and_reports_to_its_leader(
    supervisor: Supervisor, client: Client, tmp_path: Path, network: bool
) -> None:
    spec = vm_agent(tmp_path, mode="kvm", network=network, CLAUDIO_TURNS="2", CLAUDIO_INTENTS="2")
    run_id = client.start(spec)
    entry = InboxEntry(message_id="m1", from_candidate_id="peer", kind="signal", payload={"a": 1})
    inbox = InboxSnapshot(
        version=1, execution_id="e", candidate_id="c", iteration=1, entries=(entry,)
    )
    put = client.ask_until("runs", PutInbox(run_id=run_id, inbox=inbox))
    assert isinstance(put, SidecarState)
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
    assert (state.machine or "").startswith("kvm")
    intents = client.ask("runs", ReadIntents(run_id=run_id))
    assert isinstance(intents, IntentList)
    assert {intent.audience for intent in intents.intents} >= {"leader"}
    assert qemus_of(supervisor) == []
    assert leftovers(supervisor, run_id) == []


def test_a_cancelled_run_leaves_nothing(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id, process = up(client, tmp_path, "trap '' TERM; echo up; sleep 600")
    client.cancel(run_id, grace=5)
    assert client.wait_end(run_id, BOOT_PATIENCE).status == RunStatus.CANCELLED
    assert ends(process, ENDS_SECONDS)
    assert leftovers(supervisor, run_id) == []


def test_a_killed_run_process_is_its_machines_end(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id, process = up(client, tmp_path)
    kill(process)
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert (state.status, "SIGKILL" in (state.error or "")) == (RunStatus.FAILED, True)
    assert leftovers(supervisor, run_id) == []


def test_a_killed_supervisor_finds_the_machine_running_when_it_returns(tmp_path: Path) -> None:
    with running_supervisor() as supervisor:
        with supervisor.connect() as client:
            script = "echo up; while [ ! -e go ]; do sleep 0.1; done"
            run_id, process = up(client, tmp_path, script)
        supervisor.kill()
        supervisor.start()
        with supervisor.connect() as client:
            state = client.state(run_id)
            assert (state.status, state.run_process) == (RunStatus.RUNNING, process)
            client.cancel(run_id, grace=10)
            client.wait_end(run_id, BOOT_PATIENCE)
            seqs = [event.seq for event in client.events(run_id)]
            assert seqs == list(range(len(seqs)))
        assert ends(process, ENDS_SECONDS)
