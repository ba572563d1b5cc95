"""What is promised when something dies, with real processes and real SIGKILLs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervisor_kit import (
    CONFIGS,
    PATIENCE,
    Client,
    Supervisor,
    agent_spec,
    kill,
    processes_of,
    running_supervisor,
    workflow_spec,
)

from voidbus.actors.messages.actor import InspectSystem, SystemStatus
from voidbus.actors.messages.runs import RunStatus, StartRun
from voidbus.actors.messages.sidecar import IntentList, ReadIntents
from voidbus.actors.messages.supervisor import StopSupervisor
from voidbus.actors.runtime.process import ProcessHandle, identity_of
from voidbus.transport.fault import BusError

SANDBOX = CONFIGS / "sandbox.yaml"

# Writes another pid into the journal of a supervisor that is not running: PATH PID.
_FORGE = """
import sqlite3, sys
journal = sqlite3.connect(sys.argv[1])
journal.execute("UPDATE runs SET process = json_set(process, '$.pid', ?)", (int(sys.argv[2]),))
journal.commit()
journal.close()
"""


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with running_supervisor() as running:
        yield running


@pytest.fixture
def client(supervisor: Supervisor) -> Iterator[Client]:
    with supervisor.connect() as connected:
        yield connected


def gapless(client: Client, run_id: str) -> None:
    seqs = [event.seq for event in client.events(run_id)]
    assert seqs == list(range(len(seqs)))


def a_waiting_run(client: Client, fifo: Path, folder: Path, name: str) -> str:
    """A workflow whose first step waits for somebody to write to the fifo."""
    os.mkfifo(fifo)
    spec = workflow_spec(
        folder, "wait: echo waiting; cat " + str(fifo), "after: echo done", name=name
    )
    run_id = client.start(spec)
    client.wait_for(run_id, lambda event: event.message == "waiting")
    return run_id


def a_stubborn_spec(folder: Path) -> Path:
    """A step that ignores SIGTERM, as does what it starts."""
    os.mkfifo(folder / "never")
    script = f"trap '' TERM; echo up; cat {folder / 'never'}"
    return workflow_spec(folder, f"hang: {script}", name="stubborn")


def leased_process(directory: Path) -> int:
    """The process of its machine that a run has written down, to be reaped."""
    leases = [json.loads(line) for line in (directory / "leases.jsonl").read_text().splitlines()]
    return next(int(lease["pid"]) for lease in leases if "pid" in lease)


def post_intent(url: str, payload: str) -> str:
    """Send an intent as an agent does; its id, of the 201."""
    intent = {"kind": "signal", "audience": "leader", "priority": "low", "payload": payload}
    request = urllib.request.Request(url, json.dumps(intent).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        assert answer.status == 201
        return str(json.load(answer)["intent_id"])


def test_runs_go_on_when_the_supervisor_is_killed_and_finish_under_the_next_one(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    fifos = [tmp_path / f"fifo{n}" for n in range(3)]
    runs = [a_waiting_run(client, fifo, tmp_path, f"flow{n}") for n, fifo in enumerate(fifos)]
    processes = [client.state(run_id).run_process for run_id in runs]
    supervisor.kill()
    # Two of them get on with their work while there is no supervisor.
    for fifo in fifos[:2]:
        fifo.write_text("go\n")
    supervisor.start()
    assert [client.state(run_id).run_process for run_id in runs[2:]] == processes[2:]
    fifos[2].write_text("go\n")
    for run_id in runs:
        state = client.wait_end(run_id)
        assert state.status is RunStatus.SUCCEEDED
        assert state.report is not None
        assert state.report.output == "done\n"
        gapless(client, run_id)


def test_a_run_that_ends_while_there_is_no_supervisor_is_not_lost(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = a_waiting_run(client, tmp_path / "fifo", tmp_path, "flow")
    pid = client.state(run_id).run_process
    assert pid is not None
    handle = ProcessHandle.adopt(identity_of(pid))
    supervisor.kill()
    (tmp_path / "fifo").write_text("go\n")
    assert handle.wait(PATIENCE), "the run process ends by itself, its events spooled"
    handle.close()
    supervisor.start()
    state = client.wait_end(run_id)
    assert state.status is RunStatus.SUCCEEDED
    gapless(client, run_id)


def test_a_run_process_that_died_meanwhile_is_reported_and_its_leftovers_are_reaped(
    supervisor: Supervisor, client: Client
) -> None:
    run_id = client.start(SANDBOX)
    client.wait_type(run_id, "sandbox.ready")
    pid = client.state(run_id).run_process
    assert pid is not None
    directory = supervisor.state_dir / "runs" / run_id
    below = [ProcessHandle.adopt(identity_of(pid)) for pid in processes_of(directory)]
    assert below, "the guest's processes run in the scratch directory"
    # Stopped, the one that was leased can't end by itself with its run process: it is left over.
    leased = leased_process(directory)
    os.kill(leased, signal.SIGSTOP)
    supervisor.kill()
    kill(pid)
    assert leased in processes_of(directory)
    supervisor.start()
    state = client.wait_end(run_id)
    assert state.status is RunStatus.FAILED
    assert state.error is not None
    assert "ended while no supervisor was there" in state.error
    gapless(client, run_id)
    for handle in below:
        assert handle.wait(PATIENCE), f"{handle} outlived its run"
        handle.close()
    assert not (directory / "machine").exists()


def test_a_killed_run_process_fails_its_run_only_and_its_children_die_with_it(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    doomed = client.start(a_stubborn_spec(tmp_path))
    bystander = client.start(SANDBOX)
    client.wait_type(bystander, "sandbox.ready")
    client.wait_for(doomed, lambda event: event.message == "up")
    directory = supervisor.state_dir / "runs" / doomed
    below = [ProcessHandle.adopt(identity_of(pid)) for pid in processes_of(directory)]
    assert below, "the guest agent and the agent program run in the scratch directory"
    pid = client.state(doomed).run_process
    assert pid is not None
    kill(pid)
    state = client.wait_end(doomed)
    assert state.status is RunStatus.FAILED
    assert state.error == "its process ended: killed by SIGKILL"
    for handle in below:
        assert handle.wait(PATIENCE), f"{handle} outlived its run process"
        handle.close()
    assert client.state(bystander).status is RunStatus.RUNNING
    gapless(client, doomed)


def test_stages_a_killed_run_process_had_only_queued_are_skipped(
    client: Client, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "never")
    wait = f"wait: echo waiting; cat {tmp_path / 'never'}"
    after = "      depends_on: [wait]\n"
    run_id = client.start(workflow_spec(tmp_path, wait, "after: echo done", extra=after))
    client.wait_for(run_id, lambda event: event.message == "waiting")
    pid = client.state(run_id).run_process
    assert pid is not None
    kill(pid)
    state = client.wait_end(run_id)
    ends = [
        (event.event_type, event.stage_name)
        for event in client.events(run_id)
        if event.event_type in ("stage.failed", "stage.skipped")
    ]
    assert ends == [("stage.failed", "wait"), ("stage.skipped", "after")]
    assert state.stage_states is not None
    assert state.stage_states["after"].status == "skipped"


def test_a_recycled_pid_is_not_adopted(supervisor: Supervisor, client: Client) -> None:
    run_id = client.start(SANDBOX)
    client.wait_type(run_id, "sandbox.ready")
    pid = client.state(run_id).run_process
    assert pid is not None
    supervisor.kill()
    kill(pid)
    # Another process stands where the journal says the run's was: same pid, another start time.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as impostor:
        journal = supervisor.state_dir / "journal.sqlite"
        subprocess.run(
            [
                sys.executable,
                "-c",
                _FORGE,
                str(journal),
                str(impostor.pid),
            ],
            check=True,
            timeout=PATIENCE,
        )
        supervisor.start()
        state = client.wait_end(run_id)
        assert state.status is RunStatus.FAILED
        assert impostor.poll() is None, "a process that is not the run's is left alone"
        impostor.communicate(b"\n", timeout=PATIENCE)


def test_a_run_can_be_cancelled_after_its_supervisor_was_replaced(
    supervisor: Supervisor, client: Client
) -> None:
    run_id = client.start(SANDBOX)
    client.wait_type(run_id, "sandbox.ready")
    supervisor.kill()
    supervisor.start()
    assert client.state(run_id).status is RunStatus.RUNNING
    assert client.supervisor().adopted_runs == 1
    client.cancel(run_id, "enough")
    state = client.wait_end(run_id)
    assert (state.status, state.terminal_reason) == (RunStatus.CANCELLED, "enough")


def test_intents_survive_the_run_and_the_supervisor(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(agent_spec(tmp_path, CLAUDIO_INTENTS="2"))
    assert client.wait_end(run_id).status is RunStatus.SUCCEEDED
    supervisor.kill()
    supervisor.start()
    intents = client.ask_until("runs", ReadIntents(run_id=run_id, drain=True))
    assert isinstance(intents, IntentList)
    assert [intent.kind for intent in intents.intents] == ["signal", "evaluation"]
    drained = client.ask("runs", ReadIntents(run_id=run_id))
    assert isinstance(drained, IntentList)
    assert drained.intents == ()


@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "unsupervised"])
def test_intents_survive_a_run_process_that_is_killed(
    supervisor: Supervisor, client: Client, tmp_path: Path, supervised: bool
) -> None:
    run_id = client.start(agent_spec(tmp_path, CLAUDIO_HANG="1"))
    started = client.wait_type(run_id, "sidecar.started")
    url = f"http://{(started.payload or {})['address']}/v1/intents"
    pid = client.state(run_id).run_process
    assert pid is not None
    if not supervised:
        supervisor.kill()
    sent = [post_intent(url, "first"), post_intent(url, "second")]
    # Nothing is waited for between the agent's 201 and the kill.
    kill(pid)
    if not supervised:
        supervisor.start()
    assert client.wait_end(run_id).status is RunStatus.FAILED
    drained = client.ask_until("runs", ReadIntents(run_id=run_id, drain=True))
    assert isinstance(drained, IntentList)
    assert [intent.intent_id for intent in drained.intents] == sent
    again = client.ask("runs", ReadIntents(run_id=run_id, drain=True))
    assert isinstance(again, IntentList)
    assert again.intents == ()


def test_a_polite_stop_waits_for_runs_and_refuses_new_ones(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = a_waiting_run(client, tmp_path / "fifo", tmp_path, "flow")
    client.ask("root", StopSupervisor(runs="finish", deadline=PATIENCE))
    with pytest.raises(BusError, match="stopping and takes no new runs"):
        client.ask("runs", StartRun(file=str(SANDBOX)))
    (tmp_path / "fifo").write_text("go\n")
    assert supervisor.process is not None
    assert supervisor.process.wait(PATIENCE) == 0
    supervisor.start()
    assert client.state(run_id).status is RunStatus.SUCCEEDED


def test_a_polite_stop_cancels_what_is_left_at_its_deadline(
    supervisor: Supervisor, client: Client
) -> None:
    run_id = client.start(SANDBOX)
    client.wait_type(run_id, "sandbox.ready")
    client.ask("root", StopSupervisor(runs="finish", deadline=1.0))
    assert supervisor.process is not None
    assert supervisor.process.wait(PATIENCE) == 0
    supervisor.start()
    assert client.state(run_id).status is RunStatus.CANCELLED
    assert processes_of(supervisor.state_dir / "runs") == []


def test_a_supervisor_told_to_leave_its_runs_leaves_them_to_the_next(
    supervisor: Supervisor, client: Client
) -> None:
    run_id = client.start(SANDBOX)
    client.wait_type(run_id, "sandbox.ready")
    pid = client.state(run_id).run_process
    client.ask("root", StopSupervisor(runs="leave", deadline=5.0))
    assert supervisor.process is not None
    assert supervisor.process.wait(PATIENCE) == 0
    supervisor.start()
    assert client.state(run_id).run_process == pid
    assert client.supervisor().adopted_runs == 1


def test_sigterm_stops_the_supervisor_politely(supervisor: Supervisor, client: Client) -> None:
    client.supervisor()
    assert supervisor.process is not None
    supervisor.process.send_signal(signal.SIGTERM)
    assert supervisor.process.wait(PATIENCE) == 0
    assert not (supervisor.state_dir / "supervisor.json").exists()


def test_an_agent_that_ignores_sigterm_is_killed_and_nobody_waits_for_it(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    stubborn = client.start(a_stubborn_spec(tmp_path))
    client.wait_for(stubborn, lambda event: event.message == "up")
    client.cancel(stubborn, "now", grace=1.0)
    # While the grace runs, everything else is answered and done.
    quick = client.start(workflow_spec(tmp_path, "one: echo 1"))
    assert client.wait_end(quick).status is RunStatus.SUCCEEDED
    assert client.wait_end(stubborn).status is RunStatus.CANCELLED
    assert processes_of(supervisor.state_dir / "runs" / stubborn) == []


def test_a_second_cancel_with_less_patience_hurries_the_first(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    run_id = client.start(a_stubborn_spec(tmp_path))
    client.wait_for(run_id, lambda event: event.message == "up")
    client.cancel(run_id, "please", grace=600.0)
    client.cancel(run_id, "now", grace=0.0)
    state = client.wait_end(run_id)
    assert (state.status, state.terminal_reason) == (RunStatus.CANCELLED, "please")


def test_a_run_process_that_gives_up_says_why(supervisor: Supervisor, client: Client) -> None:
    run_id = client.start(SANDBOX)
    client.wait_type(run_id, "sandbox.ready")
    log = supervisor.state_dir / "runs" / run_id / "process.log"
    with log.open("a") as file:
        file.write("out of cheese\n")
    pid = client.state(run_id).run_process
    assert pid is not None
    kill(pid)
    error = client.wait_end(run_id).error
    assert error == "its process ended: killed by SIGKILL; its log ends: out of cheese"


def test_a_skill_file_is_looked_for_beside_the_specification(
    client: Client, tmp_path: Path
) -> None:
    (tmp_path / "scouting.md").write_text("# Scouting")
    spec = agent_spec(tmp_path, "scout")
    spec.write_text(spec.read_text() + '  skills: ["file:scouting.md"]\n')
    run_id = client.start(spec)
    assert client.wait_end(run_id).status is RunStatus.SUCCEEDED
    said = [event.message for event in client.events(run_id)]
    assert any("scouting" in message and "Skills" in message for message in said)


def test_nothing_is_left_of_runs_that_ended(
    supervisor: Supervisor, client: Client, tmp_path: Path
) -> None:
    runs = [client.start(workflow_spec(tmp_path, "one: echo 1", name=f"f{n}")) for n in range(5)]
    for run_id in runs:
        client.wait_end(run_id)
    client.ask("root", StopSupervisor(runs="finish", deadline=PATIENCE))
    assert supervisor.process is not None
    assert supervisor.process.wait(PATIENCE) == 0
    assert list((supervisor.state_dir / "runs").iterdir()) == []
    assert processes_of(supervisor.state_dir) == []


def test_an_adopted_run_answers_on_the_bus(supervisor: Supervisor, client: Client) -> None:
    run_id = client.start(SANDBOX)
    client.wait_type(run_id, "sandbox.ready")
    supervisor.kill()
    supervisor.start()
    status = client.ask_until(f"run-{run_id}/system", InspectSystem())
    assert isinstance(status, SystemStatus)
    assert [actor.path for actor in status.actors] == ["run", "vm"]
