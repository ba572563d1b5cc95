"""A whole run in one process: real journal, real guest processes, and all that goes wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import urllib.request
from pathlib import Path

import pytest
from actor_kit import PATIENCE
from run_kit import RUN_ID, House, agent, workflow

from voidbus.actors import journal_writer
from voidbus.actors import sidecar as sidecar_module
from voidbus.actors.messages.artifacts import ArtifactList, ListArtifacts
from voidbus.actors.messages.journal import AppendEvents, ProcessRecord, RecordProcess
from voidbus.actors.messages.runs import InspectRun, RunState, RunStatus
from voidbus.actors.messages.sidecar import IntentList, ReadIntents
from voidbus.actors.recovery import recover
from voidbus.actors.runtime.process import ProcessHandle, identity_of
from voidbus.actors.sidecar import SidecarActor
from voidbus.actors.spool import Spool
from voidbus.vm.channel import GuestChannel
from voidbus.vm.machine import MachineError
from voidbus.vm.process.machine import ProcessMachine

SANDBOX = {"kind": "sandbox", "name": "box", "sandbox": {"mode": "mock"}}


def a_waiting_step(house: House) -> Path:
    """A step that has said `up` and waits for somebody to write to a fifo."""
    fifo = house.folder / "fifo"
    os.mkfifo(fifo)
    house.start(workflow(f"wait: echo up; cat {fifo}", "after: echo done"))
    house.wait_message("up")
    return fifo


# -- whole runs --------------------------------------------------------------------------------


def test_a_workflow_runs_from_its_machine_to_its_outcome(house: House) -> None:
    house.start(workflow("one: echo hello", "two: tr a-z A-Z"), input_text="given")
    state = house.wait_over()
    assert (state.status, state.exit_code, state.machine) == (RunStatus.SUCCEEDED, 0, "process")
    assert state.report is not None
    assert state.report.output == "given\nHELLO\n"
    assert house.types()[2:] == [
        "stage.queued",
        "stage.queued",
        "machine.started",
        "stage.started",
        "log.chunk",
        "stage.completed",
        "stage.started",
        "log.chunk",
        "stage.completed",
        "log.closed",
        "run.finished",
    ]
    assert state.stage_states is not None
    assert {name: s.status for name, s in state.stage_states.items()} == {
        "one": "succeeded",
        "two": "succeeded",
    }
    assert (state.active_stage_count, state.active_microvm_count) == (0, 0)
    assert not (house.folder / "machine/proc").exists()


def test_an_agent_runs_with_its_sidecar_and_leaves_its_intents(house: House) -> None:
    house.start(agent(CLAUDIO_INTENTS="2"), input_text='{"a": 1}')
    state = house.wait_over()
    assert state.status is RunStatus.SUCCEEDED, state.error
    assert state.report is not None
    assert (state.report.kind, state.report.stages) == ("agent", 1)
    types = house.types()
    assert types.count("sidecar.intent_accepted") == 2
    assert types.index("sidecar.started") < types.index("machine.started")
    assert types[-1] == "run.finished"
    intents = house.journal.store.take_intents  # its actor has nothing to do any more
    assert intents is not None
    listed = house.ask("journal", ListArtifacts(run_id=RUN_ID))
    assert isinstance(listed, ArtifactList)
    (kept,) = listed.artifacts
    assert (kept.stage, kept.name, kept.media_type) == ("scout", "", "application/json")
    assert b'"status": "success"' in house.artifacts.read(kept.digest, 0, kept.size_bytes)
    assert state.artifact_publication.status == "published"
    (entry,) = state.artifact_publication.manifest
    assert (entry.name, entry.size_bytes, entry.digest) == (
        "result.json",
        kept.size_bytes,
        kept.digest,
    )
    assert not (house.folder / "machine").exists(), "nothing of the machine is left"


def test_a_failed_step_fails_the_run_with_its_words(house: House) -> None:
    house.start(workflow("bad: echo because >&2; exit 3", "never: echo no"))
    state = house.wait_over()
    assert (state.status, state.exit_code) == (RunStatus.FAILED, None)
    assert state.error is not None
    assert "it was skipped" in state.error
    failed = next(e for e in house.events() if e.event_type == "stage.failed")
    assert failed.payload is not None
    assert failed.payload["error"] == "Command failed with exit code 3: because"
    assert state.stage_states is not None
    assert state.stage_states["never"].status == "skipped"


def test_a_skill_file_that_is_not_there_fails_the_run_in_words(house: House) -> None:
    spec = agent(messaging=False)
    spec["agent"]["skills"] = ["file:/nowhere/skill.md"]
    house.start(spec)
    state = house.wait_over()
    assert state.status is RunStatus.FAILED
    assert state.error is not None
    assert "/nowhere/skill.md" in state.error


# -- cancel in every phase ---------------------------------------------------------------------


class BootingMachine(ProcessMachine):
    """A machine that boots until it is stopped."""

    booting = threading.Event()

    def start(self, timeout: float) -> GuestChannel:
        self.booting.set()
        self._stopping.wait(timeout)
        raise MachineError("stopped")


class WaitingSidecar(SidecarActor):
    """A sidecar that is not up before it is let go."""

    starting = threading.Event()
    let_go = threading.Event()

    def on_start(self) -> None:
        self.starting.set()
        assert self.let_go.wait(PATIENCE)
        super().on_start()


def test_a_cancel_while_the_machine_boots_stops_it(house: House) -> None:
    BootingMachine.booting.clear()
    house.start(SANDBOX, machine=BootingMachine)
    assert BootingMachine.booting.wait(PATIENCE)
    house.cancel("too slow")
    state = house.wait_over()
    assert (state.status, state.terminal_reason) == (RunStatus.CANCELLED, "too slow")
    assert house.types()[2:] == ["run.cancelled"]


def test_a_cancel_before_the_sidecar_is_up_starts_no_machine(house: House) -> None:
    WaitingSidecar.starting.clear()
    WaitingSidecar.let_go.clear()
    house.start(agent(), sidecar=WaitingSidecar)
    assert WaitingSidecar.starting.wait(PATIENCE)
    house.cancel()
    WaitingSidecar.let_go.set()
    assert house.wait_over().status is RunStatus.CANCELLED
    assert house.system.find("vm") is None
    assert "machine.started" not in house.types()
    assert "pid" not in (house.folder / "leases.jsonl").read_text()


def test_a_cancel_while_a_step_runs_signals_it_and_keeps_its_last_words(house: House) -> None:
    os.mkfifo(house.folder / "never")
    # A shell that waits in `read` takes the signal at once.
    script = (
        f"trap 'echo bye; exit 0' TERM; echo up; exec 2>/dev/null; read x < {house.folder}/never"
    )
    house.start(workflow(f"wait: {script}", "after: echo no"))
    house.wait_message("up")
    house.cancel("enough")
    state = house.wait_over()
    assert (state.status, state.terminal_reason) == (RunStatus.CANCELLED, "enough")
    assert house.log() == ["up", "bye"]
    assert state.stage_states is not None
    assert {name: s.status for name, s in state.stage_states.items()} == {
        "wait": "failed",
        "after": "skipped",
    }
    ends = {
        e.stage_name: e for e in house.events() if e.event_type[:10] in ("stage.fail", "stage.skip")
    }
    assert ends["wait"].payload is not None
    assert (ends["wait"].payload["exit_code"], ends["wait"].payload["error"]) == (
        -1,
        "run cancelled",
    )
    assert ends["after"].payload == {"reason": "run cancelled", "stage_attempt": 1}
    assert ends["after"].group_id == "g1"
    assert house.types()[-1] == "run.cancelled"


def test_a_stubborn_program_is_killed_when_its_grace_is_over(house: House) -> None:
    os.mkfifo(house.folder / "never")
    house.start(workflow(f"hang: trap '' TERM; echo up; cat {house.folder}/never"))
    house.wait_message("up")
    with ProcessHandle.adopt(identity_of(house.machine_pid())) as machine:
        house.cancel(grace=0.1)
        assert house.wait_over().status is RunStatus.CANCELLED
        assert machine.wait(0.0), "it is cancelled only when its machine is gone"


def test_a_second_cancel_changes_nothing(house: House) -> None:
    house.start(SANDBOX)
    house.wait_type("sandbox.ready")
    house.cancel("first")
    house.run.post(lambda: house.run.cancel("second", None))
    assert house.wait_over().terminal_reason == "first"
    assert house.types().count("run.cancelled") == 1


# -- what dies under it ------------------------------------------------------------------------


class BrokenMachine(ProcessMachine):
    def start(self, timeout: float) -> GuestChannel:
        raise MachineError("machine box: no /dev/kvm; load the kvm module")


def test_a_machine_that_does_not_start_fails_the_run_with_its_reason(house: House) -> None:
    house.start(SANDBOX, machine=BrokenMachine)
    state = house.wait_over()
    assert (state.status, state.error) == (
        RunStatus.FAILED,
        "the machine did not start: machine box: no /dev/kvm; load the kvm module",
    )


class StillbornMachine(ProcessMachine):
    """Its guest agent dies of its settings."""

    def _settings(self) -> bytes:
        return b"\xff" * 8


def test_a_machine_that_dies_while_it_boots_did_not_start(house: House) -> None:
    house.start(SANDBOX, machine=StillbornMachine)
    state = house.wait_over()
    assert state.status is RunStatus.FAILED
    assert state.error is not None
    assert state.error.startswith("the machine did not start: ")


def test_a_machine_killed_under_a_program_fails_the_run_with_that_reason(house: House) -> None:
    a_waiting_step(house)
    os.kill(house.machine_pid(), signal.SIGKILL)
    state = house.wait_over()
    assert state.status is RunStatus.FAILED
    assert state.error is not None
    assert state.error.startswith("the machine ended: the guest agent was killed by SIGKILL")
    assert state.stage_states is not None
    assert {name: s.status for name, s in state.stage_states.items()} == {
        "wait": "failed",
        "after": "skipped",
    }


def test_a_machine_killed_while_nothing_runs_fails_the_run_too(house: House) -> None:
    house.start(SANDBOX)
    house.wait_type("sandbox.ready")
    os.kill(house.machine_pid(), signal.SIGKILL)
    state = house.wait_over()
    assert state.error is not None
    assert "killed by SIGKILL" in state.error


def test_a_vm_actor_that_fails_fails_the_run_and_takes_its_machine_along(house: House) -> None:
    a_waiting_step(house)
    with ProcessHandle.adopt(identity_of(house.machine_pid())) as machine:
        house.crash("vm")
        state = house.wait_over()
        assert machine.wait(PATIENCE)
    assert (state.status, state.error) == (
        RunStatus.FAILED,
        "the VM actor failed: RuntimeError: told to fail",
    )


def test_a_run_actor_that_fails_leaves_nothing_running_and_can_be_recovered(house: House) -> None:
    a_waiting_step(house)
    with ProcessHandle.adopt(identity_of(house.machine_pid())) as machine:
        house.crash("run")
        assert house.over.wait(PATIENCE)
        assert machine.wait(PATIENCE)
    state = house.ask("journal", InspectRun(run_id=RUN_ID))
    assert isinstance(state, RunState)
    for batch in recover(state, house.folder, reason="it failed", cancel_reason=None).batches:
        house.ask("journal", batch)
    state = house.wait_over()
    assert (state.status, state.error) == (RunStatus.FAILED, "it failed")
    assert state.stage_states is not None
    assert state.stage_states["wait"].status == "failed"


def post_intent(address: tuple[str, int], summary: str) -> None:
    body = {
        "kind": "signal",
        "audience": "broadcast",
        "payload": {"summary_text": summary},
        "priority": "normal",
    }
    request = urllib.request.Request(
        f"http://{address[0]}:{address[1]}/v1/intents", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        assert reply.status == 201


def test_a_sidecar_that_fails_is_back_at_its_address_with_every_intent(house: House) -> None:
    house.start(agent(CLAUDIO_INTENTS="0", CLAUDIO_HANG="1"))
    house.wait_type("machine.started")
    assert house.desk is not None
    address = house.desk.address
    post_intent(address, "before")
    started = house.wait_type("sidecar.started")
    first = house.crash("sidecar")
    house.wait_for(lambda e: e.event_type == "sidecar.started" and e.seq > started.seq)
    second = house.system.find("sidecar")
    assert second is not None
    assert second is not first
    assert house.desk.address == address
    post_intent(address, "after")
    intents = house.ask("sidecar", ReadIntents(run_id=RUN_ID))
    assert isinstance(intents, IntentList)
    assert [i.payload for i in intents.intents] == [
        {"summary_text": "before"},
        {"summary_text": "after"},
    ]
    house.cancel(grace=0.0)
    assert house.wait_over().status is RunStatus.CANCELLED


def test_health_checks_are_lines_of_the_debug_log_and_no_events(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sidecar_module, "_LOG_LINES", 2)
    caplog.set_level(logging.DEBUG, "voidbus.actors")
    house.start(agent(CLAUDIO_INTENTS="0", CLAUDIO_HANG="1"))
    house.wait_type("machine.started")
    assert house.desk is not None
    host, port = house.desk.address
    for _ in range(4):
        with urllib.request.urlopen(f"http://{host}:{port}/v1/health", timeout=PATIENCE) as reply:
            assert json.load(reply)["status"] == "ok"
    lines = [record for record in caplog.records if "health_served" in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.DEBUG] * 2, "a guest can't fill the log"
    name, _, fields = lines[0].getMessage().partition(" ")
    assert name == "sidecar.health_served"
    assert set(json.loads(fields)) == {"uptime_ms"}
    house.cancel(grace=0.0)
    house.wait_over()
    assert "sidecar.started" in house.types()
    assert "sidecar.health_served" not in house.types()


def test_a_sidecar_that_keeps_failing_ends_the_run(house: House) -> None:
    class FailingSidecar(SidecarActor):
        def on_start(self) -> None:
            raise OSError("no port")

    house.start(agent(), sidecar=FailingSidecar)
    state = house.wait_over()
    assert state.status is RunStatus.FAILED
    assert state.error is not None
    assert "no port" in state.error


# -- the journal -------------------------------------------------------------------------------


def test_a_journal_that_was_away_gets_everything_in_order(house: House) -> None:
    fifo = a_waiting_step(house)
    house.hub.detach("journal")
    fifo.write_text("more\n" * 300)
    assert house.run._writer.waiting >= 0
    house.hub.attach("journal", house.journal)
    house.run.link_changed(True)
    state = house.wait_over()
    assert state.status is RunStatus.SUCCEEDED
    assert house.log("wait") == ["up", *["more"] * 300]


def test_a_run_that_the_journal_refuses_is_abandoned_with_its_machine(house: House) -> None:
    fifo = a_waiting_step(house)
    with ProcessHandle.adopt(identity_of(house.machine_pid())) as machine:
        newer = ProcessRecord(generation=2, token_digest="00" * 32)
        house.ask("journal", RecordProcess(run_id=RUN_ID, process=newer))
        before = len(house.events())
        fifo.write_text("go\n")
        state = house.wait_over()
        assert machine.wait(PATIENCE)
    assert state.status is RunStatus.RUNNING, "another process has the run now"
    assert len(house.events()) == before


def test_a_full_disk_delays_events_and_loses_none(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = a_waiting_step(house)
    add, failures = Spool.add, iter([True] * 4)

    def full(spool: Spool, batch: AppendEvents) -> None:
        if next(failures, False):
            raise OSError(28, "no space left")
        add(spool, batch)

    monkeypatch.setattr(journal_writer, "_RETRY_SECONDS", 0.02)
    monkeypatch.setattr(Spool, "add", full)
    fifo.write_text("more\n" * 2000)
    state = house.wait_over()
    assert state.status is RunStatus.SUCCEEDED
    assert state.terminal_event_id == house.events()[-1].event_id
    assert len(house.log("wait")) == 2001
    assert not next(failures, False), "the disk was full when the run ended"


def test_a_poll_that_finds_no_intents_leaves_no_event(house: House) -> None:
    house.start(agent(CLAUDIO_HANG="1"))
    house.wait_type("sidecar.started")
    for _ in range(3):
        drained = house.ask("sidecar", ReadIntents(run_id=RUN_ID, drain=True))
        assert drained == IntentList(run_id=RUN_ID, intents=())
    house.cancel(grace=0.0)
    house.wait_over()
    assert "sidecar.acknowledged" not in house.types()
