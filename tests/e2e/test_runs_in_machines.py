"""Whole runs in real machines, through a real supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from guest_vm import eventually
from patience import SLOW
from supervisor_kit import PATIENCE, Client, Supervisor, kill, running_supervisor
from vm_kit import BOOT_PATIENCE, ends, leftovers, machine_processes, vm_agent, vm_workflow

from voidbus.actors.messages.artifacts import ArtifactPart, ReadArtifact
from voidbus.actors.messages.runs import ConsoleText, ReadConsole, RunStatus
from voidbus.actors.messages.sidecar import IntentList, PutInbox, ReadIntents, SidecarState
from voidbus.actors.runtime.process import identity_of
from voidbus.cli.event_line import log_text
from voidbus.sidecar.model import InboxEntry, InboxSnapshot
from voidbus.vm.machine import Machine

pytestmark = pytest.mark.timeout(300 * SLOW)

ENDS_SECONDS = 20.0 * SLOW
"""For a process to end, or what it leaves to be tidied away, once nothing keeps it."""


def open_files(supervisor: Supervisor) -> Counter[str]:
    """What the supervisor's descriptors lead to, without the numbers that tell sockets apart."""
    assert supervisor.process is not None
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{supervisor.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[re.sub(r"\d+", "N", str(entry.readlink()))] += 1
    return found


def printed(client: Client, run_id: str) -> str:
    texts = (log_text(event) for event in client.events(run_id))
    return "\n".join(text for text in texts if text is not None)


def structured_output(client: Client, run_id: str) -> dict[str, Any]:
    """What the one program of a run left in its output file."""
    (entry,) = client.state(run_id).artifact_publication.manifest
    asked = client.leaf.ask(
        "supervisor/archive", ReadArtifact(run_id=run_id, stage=entry.stage), timeout=PATIENCE
    )
    assert isinstance(asked.result(), ArtifactPart)
    output: dict[str, Any] = json.loads(asked.attachments[0])
    return output


INBOX = InboxSnapshot(
    version=1,
    execution_id="e",
    candidate_id="c",
    iteration=4,
    entries=(
        InboxEntry(message_id="m1", from_candidate_id="peer", kind="signal", payload={"a": 1}),
    ),
)


@pytest.mark.parametrize(
    "network", [False, pytest.param(True, marks=pytest.mark.needs("passt"))], ids=["vsock", "card"]
)
def test_an_agent_finds_its_skill_reads_context_and_inbox_and_reports_to_its_leader(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path, network: bool
) -> None:
    spec = vm_agent(
        tmp_path, mode=kind.name, network=network, CLAUDIO_TURNS="2", CLAUDIO_INTENTS="2"
    )
    run_id = client.start(spec)
    # The inbox is there before the agent looks: the sidecar is up before the machine.
    put = client.ask_until("runs", PutInbox(run_id=run_id, inbox=INBOX))
    assert isinstance(put, SidecarState)
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
    assert (state.machine or "").startswith(kind.name)
    assert "Skills: void-messaging." in printed(client, run_id)
    output = structured_output(client, run_id)
    assert (output["iteration_seen"], output["inbox_seen"]) == (INBOX.iteration, ["m1"])
    assert output["metrics"]["intents_sent"] == 2
    intents = client.ask("runs", ReadIntents(run_id=run_id))
    assert isinstance(intents, IntentList)
    told = [(intent.kind, intent.audience) for intent in intents.intents]
    assert told == [("signal", "broadcast"), ("evaluation", "leader")]
    assert leftovers(supervisor, run_id) == []


def test_an_agent_finds_its_mcp_server_and_its_calls_arrive_on_the_host(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(
        vm_agent(tmp_path, "tools", mode=kind.name, CLAUDIO_MCP="1", CLAUDIO_INTENTS="0")
    )
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
    assert "Skills: void-messaging." in printed(client, run_id)
    events = client.events(run_id)
    used = [event.message for event in events if event.event_type == "agent.tool_used"]
    assert [tool for tool in used if tool.startswith("mcp__")] == [
        "mcp__void-mcp__read_peer_messages",
        "mcp__void-mcp__broadcast_observation",
        "mcp__void-mcp__recommend_to_leader",
    ]
    intents = client.ask("runs", ReadIntents(run_id=run_id))
    assert isinstance(intents, IntentList)
    told = [(intent.kind, intent.audience) for intent in intents.intents]
    assert told == [("signal", "broadcast"), ("proposal", "leader")]


def test_a_workflow_shares_its_machine_and_its_files(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    spec = vm_workflow(
        tmp_path, ("write", "echo kept > note"), ("read", "sleep 0.2; cat note"), mode=kind.name
    )
    run_id = client.start(spec)
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert state.status == RunStatus.SUCCEEDED
    assert "kept" in printed(client, run_id)


def test_directories_of_the_host_are_mounted_as_the_specification_says(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    given, wanted = tmp_path / "given", tmp_path / "wanted"
    given.mkdir()
    (given / "in.txt").write_text("from the host")
    spec = vm_workflow(
        tmp_path,
        ("copy", "cp /data/in.txt /out/out.txt && ! touch /data/no 2>/dev/null"),
        mode=kind.name,
        mounts=[
            {"host": str(given), "guest": "/data"},
            {"host": str(wanted), "guest": "/out", "mode": "rw"},
        ],
    )
    run_id = client.start(spec)
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
    assert (wanted / "out.txt").read_text() == "from the host"
    assert [path.name for path in given.iterdir()] == ["in.txt"]


def test_a_directory_that_is_not_there_fails_the_run_before_a_machine_starts(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    mounts = [{"host": str(tmp_path / "nothing"), "guest": "/data"}]
    run_id = client.start(vm_workflow(tmp_path, ("never", "true"), mode=kind.name, mounts=mounts))
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert state.status == RunStatus.FAILED
    assert str(tmp_path / "nothing") in (state.error or "")


def test_the_console_is_shown_while_a_run_goes_on_and_after_it(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(vm_workflow(tmp_path, ("wait", "echo up; sleep 60"), mode=kind.name))
    client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    live = client.ask("runs", ReadConsole(run_id=run_id))
    assert isinstance(live, ConsoleText)
    run_process = client.state(run_id).run_process
    assert run_process is not None
    client.cancel(run_id, grace=10)
    client.wait_end(run_id, BOOT_PATIENCE)
    assert ends(run_process, ENDS_SECONDS)
    gone = supervisor.state_dir / "runs" / run_id
    assert eventually(lambda: not gone.exists(), ENDS_SECONDS)
    kept = client.ask_until("runs", ReadConsole(run_id=run_id))
    assert isinstance(kept, ConsoleText)
    assert kept.text.startswith(live.text[:1000])
    assert "reboot: " in kept.text or "Power down" in kept.text


GRACE = 5.0

BEYOND_GRACE = 5.0 * SLOW
"""What a machine may take to be gone once the grace is over (seconds). Half of it is for its end
in order, after which it is killed ("Cancel" in docs/architecture.md); the other half, more than
the machines' own KILL_SECONDS, is a busy host's to carry that out."""


@pytest.mark.parametrize("moment", ["booting", "executing", "streaming"])
def test_a_cancelled_run_leaves_nothing_whatever_it_was_at(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path, moment: str
) -> None:
    script = "echo up; yes" if moment == "streaming" else "trap '' TERM; echo up; sleep 60"
    # What a supervisor opens for its first run stays open.
    first = client.start(vm_workflow(tmp_path, ("first", "true"), name="first", mode="mock"))
    client.wait_end(first, BOOT_PATIENCE)
    before = open_files(supervisor)
    run_id = client.start(vm_workflow(tmp_path, ("busy", script), mode=kind.name))
    if moment == "booting":
        client.wait_for(run_id, lambda _: bool(machine_processes(supervisor)), BOOT_PATIENCE)
    else:
        client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    run_process = client.state(run_id).run_process
    assert run_process is not None
    assert len(machine_processes(supervisor)) == 1
    began = time.monotonic()
    client.cancel(run_id, grace=GRACE)
    left = began + GRACE + BEYOND_GRACE - time.monotonic()
    assert eventually(lambda: machine_processes(supervisor) == [], left)
    took = time.monotonic() - began
    # Only programs that don't end by themselves are waited for.
    assert took >= GRACE or moment != "executing"
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert state.status == RunStatus.CANCELLED
    assert ends(run_process, ENDS_SECONDS)
    assert leftovers(supervisor, run_id) == []
    assert machine_processes(supervisor) == []
    # A descriptor of the supervisor's is closed a moment after what it tells of. One more socket
    # is this client's, which follows events by now.
    ours = Counter({"socket:[N]": 1})
    assert eventually(lambda: open_files(supervisor) - before <= ours, ENDS_SECONDS), (
        open_files(supervisor) - before
    )


def test_a_killed_run_process_takes_its_machine_with_it(
    kind: type[Machine], supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(vm_workflow(tmp_path, ("wait", "echo up; sleep 60"), mode=kind.name))
    client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    (machine,) = machine_processes(supervisor)
    run_process = client.state(run_id).run_process
    assert run_process is not None
    kill(run_process)
    assert ends(machine, ENDS_SECONDS)
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert state.status == RunStatus.FAILED
    assert "SIGKILL" in (state.error or "")
    assert leftovers(supervisor, run_id) == []


def test_a_killed_supervisor_finds_the_machine_running_when_it_returns(
    kind: type[Machine], tmp_path: Path
) -> None:
    with running_supervisor() as supervisor:
        with supervisor.connect() as client:
            run_id = client.start(
                vm_workflow(
                    tmp_path,
                    ("wait", "echo up; while [ ! -e go ]; do sleep 0.1; done"),
                    mode=kind.name,
                )
            )
            client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
            (machine,) = machine_processes(supervisor)
            before = identity_of(machine)
        supervisor.kill()
        supervisor.start()
        with supervisor.connect() as client:
            state = client.state(run_id)
            assert state.status == RunStatus.RUNNING
            assert identity_of(machine) == before
            client.cancel(run_id, grace=10)
            client.wait_end(run_id, BOOT_PATIENCE)
            seqs = [event.seq for event in client.events(run_id)]
            assert seqs == list(range(len(seqs)))
        assert ends(machine, ENDS_SECONDS)


@pytest.mark.needs("vm")
def test_a_qemu_that_is_killed_fails_its_run_with_the_reason(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(vm_workflow(tmp_path, ("wait", "echo up; sleep 60"), mode="qemu"))
    client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
    (machine,) = machine_processes(supervisor)
    os.kill(machine, signal.SIGKILL)
    state = client.wait_end(run_id, BOOT_PATIENCE)
    assert state.status == RunStatus.FAILED
    assert "QEMU was killed by SIGKILL" in (state.error or "")
