"""What bad input gets: a clear fault, nothing started, nothing lost."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from read_only_kit import read_only
from supervisor_kit import CONFIGS, Client, Supervisor, running_supervisor, workflow_spec

from voidbus.actors.messages.actor import Inspect
from voidbus.actors.messages.journal import AppendEvents, LoadActive
from voidbus.actors.messages.runs import (
    CancelAccepted,
    CancelRun,
    InspectRun,
    ListRuns,
    RunAccepted,
    RunList,
    RunStatus,
    StartRun,
)
from voidbus.actors.messages.sidecar import ReadIntents
from voidbus.transport.fault import BusError, FaultReason
from voidbus.transport.message import Right
from voidbus.vm.select import kvm_support


@pytest.fixture(scope="module")
def supervisor() -> Iterator[Supervisor]:
    with running_supervisor() as running:
        yield running


@pytest.fixture(scope="module")
def client(supervisor: Supervisor) -> Iterator[Client]:
    with supervisor.connect() as connected:
        connected.supervisor()
        yield connected


def refused(client: Client, **fields: object) -> BusError:
    with pytest.raises(BusError) as caught:
        client.ask_until("runs", StartRun.model_validate({"file": "x.yaml", **fields}))
    return caught.value


def how_many(client: Client) -> int:
    runs = client.ask("journal", ListRuns())
    assert isinstance(runs, RunList)
    return runs.total


@pytest.mark.parametrize(
    "run_id",
    ["", "../../etc/passwd", "/abs", "a/b", ".hidden", "a b", "a\n", "x" * 101, "x" * 1_000_000],
)
def test_a_run_id_that_could_be_a_path_or_worse_is_refused(client: Client, run_id: str) -> None:
    before = how_many(client)
    error = refused(client, file=str(CONFIGS / "sandbox.yaml"), run_id=run_id)
    assert error.reason is FaultReason.INVALID
    assert len(str(error)) < 500
    assert how_many(client) == before


def test_a_specification_that_is_not_there_is_named(client: Client) -> None:
    assert "/no/such.yaml" in str(refused(client, file="/no/such.yaml"))


def test_a_bad_specification_names_line_field_and_fix(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("kind: workflow\nname: w\nworkflow:\n  steps:\n    - nam: a\n")
    before = how_many(client)
    text = str(refused(client, file=str(path)))
    assert f"{path}:5:" in text
    assert "workflow.steps[0].name" in text
    assert how_many(client) == before


def test_a_mode_that_has_no_machine_here_is_refused_with_the_way_out(
    client: Client, tmp_path: Path
) -> None:
    if kvm_support().works:
        pytest.skip("machines of kind kvm work here")
    path = tmp_path / "vm.yaml"
    path.write_text("kind: sandbox\nname: s\nsandbox: {mode: kvm}\n")
    assert "set `sandbox.mode: qemu`" in str(refused(client, file=str(path)))


def test_a_lenient_start_of_a_bad_specification_is_a_run_that_failed(
    client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("kind: nonsense\n")
    accepted = client.ask("runs", StartRun(file=str(path), strict=False))
    assert isinstance(accepted, RunAccepted)
    assert accepted.state is RunStatus.RUNNING
    state = client.wait_end(accepted.run_id)
    assert state.status is RunStatus.FAILED
    types = [event.event_type for event in client.events(accepted.run_id)]
    assert types == ["run.started", "env.provisioned", "spec.parse_failed", "run.failed"]


def test_a_bad_policy_is_refused_in_the_words_clients_know(client: Client) -> None:
    error = refused(
        client,
        file=str(CONFIGS / "sandbox.yaml"),
        policy={"max_parallel_microvms_per_run": 0},
    )
    assert "max_parallel_microvms_per_run must be >= 1" in str(error)


def test_the_same_run_id_twice_is_one_run(client: Client) -> None:
    first = client.start(CONFIGS / "sandbox.yaml", run_id="twice")
    again = client.ask("runs", StartRun(file="ignored.yaml", run_id="twice"))
    assert isinstance(again, RunAccepted)
    assert (again.run_id, again.existing) == (first, True)
    client.cancel("twice")
    client.wait_end("twice")
    error = refused(client, run_id="twice")
    assert error.reason is FaultReason.STALE
    assert "already ended" in str(error)


def test_questions_about_a_run_nobody_knows_are_answered_so(client: Client) -> None:
    for actor, message in (
        ("journal", InspectRun(run_id="nobody")),
        ("runs", CancelRun(run_id="nobody")),
        ("runs", ReadIntents(run_id="nobody")),
    ):
        with pytest.raises(BusError, match="run 'nobody' not found") as caught:
            client.ask(actor, message)
        assert caught.value.reason is FaultReason.NO_SUCH_ACTOR


def test_cancelling_a_run_that_ended_gives_its_stable_terminal_event(
    client: Client, tmp_path: Path
) -> None:
    run_id = client.start(workflow_spec(tmp_path, "one: echo 1"))
    ended = client.wait_end(run_id)
    for _ in range(2):
        answer = client.cancel(run_id)
        assert isinstance(answer, CancelAccepted)
        assert answer.state is RunStatus.SUCCEEDED
        assert answer.terminal_event_id == ended.terminal_event_id


def test_an_observer_may_look_and_not_touch(supervisor: Supervisor) -> None:
    with supervisor.connect(Right.OBSERVE) as observer:
        assert isinstance(observer.ask("journal", ListRuns()), RunList)
        assert observer.ask("runs", Inspect()).tag == "actor.status"
        for message in (CancelRun(run_id="x"), StartRun(file="x.yaml")):
            with pytest.raises(BusError) as caught:
                observer.ask("runs", message)
            assert caught.value.reason is FaultReason.REFUSED


@pytest.mark.parametrize("right", [Right.OBSERVE, Right.OPERATE])
def test_no_client_may_write_the_journal(supervisor: Supervisor, right: Right) -> None:
    with supervisor.connect(right) as intruder:
        for message in (LoadActive(), AppendEvents(run_id="x", generation=1, events=())):
            with pytest.raises(BusError) as caught:
                intruder.ask("journal", message)
            assert caught.value.reason is FaultReason.REFUSED


def test_a_second_supervisor_refuses_and_names_the_first(supervisor: Supervisor) -> None:
    second = Supervisor(supervisor.state_dir).start()
    assert second.process is not None
    assert supervisor.process is not None
    assert second.process.wait(20) == 1
    assert f"pid {supervisor.process.pid}" in second.log
    assert "Traceback" not in second.log


def test_a_state_directory_that_can_not_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    script = "import os, voidbus.cli.serve as s; raise SystemExit(s.serve(None, os.environ, {}))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "VOIDBUS_STATE_DIR": str(tmp_path / "file" / "state")},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 1
    assert "Not a directory; make it writable" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.needs("mount")
def test_a_full_disk_fails_what_needs_it_and_harms_nothing_that_runs(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True, timeout=20
    )
    supervisor = Supervisor(disk / "s")
    try:
        supervisor.start()
        with supervisor.connect() as client:
            fifo = tmp_path / "fifo"
            os.mkfifo(fifo)
            run_id = client.start(
                workflow_spec(tmp_path, f"wait: echo waiting; cat {fifo}; echo done")
            )
            client.wait_for(run_id, lambda event: event.message == "waiting")
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(b"\0" * 4096):
                    pass
            with pytest.raises(BusError, match=r"full|[Nn]o space"):
                client.ask("runs", StartRun(file=str(CONFIGS / "sandbox.yaml")))
            fifo.write_text("go\n")
            filler.unlink()
            assert client.wait_end(run_id).status is RunStatus.SUCCEEDED
            seqs = [event.seq for event in client.events(run_id)]
            assert seqs == list(range(len(seqs)))
    finally:
        supervisor.close()
        subprocess.run(["umount", "-l", str(disk)], check=False, timeout=20)


@pytest.mark.needs("mount")
def test_a_read_only_state_directory_fails_what_needs_it_and_harms_nothing_that_runs(
    tmp_path: Path,
) -> None:
    state_dir = tmp_path / "s"
    supervisor = Supervisor(state_dir).start()
    try:
        with supervisor.connect() as client:
            fifo = tmp_path / "fifo"
            os.mkfifo(fifo)
            going = client.start(
                workflow_spec(tmp_path, f"wait: echo waiting; cat {fifo}; echo done")
            )
            client.wait_for(going, lambda event: event.message == "waiting")
            with read_only(state_dir):
                failed = client.start(CONFIGS / "sandbox.yaml")
                state = client.wait_end(failed)
                assert state.status is RunStatus.FAILED
                assert state.error == (
                    "its process could not be started: its directory "
                    f"{state_dir / 'runs' / failed} can't be made: Read-only file system; "
                    "make it writable for this user"
                )
                fifo.write_text("go\n")
                ended = client.wait_end(going)
                assert ended.status is RunStatus.SUCCEEDED
                assert ended.report is not None
                assert ended.report.output == "waiting\ngo\ndone\n"
                second = Supervisor(state_dir).start()
                assert second.process is not None
                assert second.process.wait(20) == 1
            assert f"state directory {state_dir}: Read-only file system; make it" in second.log
            assert "Traceback" not in second.log
            after = client.start(workflow_spec(tmp_path, "one: echo 1", name="after"))
            assert client.wait_end(after).status is RunStatus.SUCCEEDED
            for run_id in (failed, going, after):
                seqs = [event.seq for event in client.events(run_id)]
                assert seqs == list(range(len(seqs)))
    finally:
        supervisor.close()


def test_more_runs_than_allowed_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with (
        running_supervisor(VOIDBUS_MAX_PARALLEL_RUNS="1") as supervisor,
        supervisor.connect() as client,
    ):
        first = client.start(CONFIGS / "sandbox.yaml")
        with pytest.raises(BusError, match="max_parallel_runs") as caught:
            client.ask("runs", StartRun(file=str(CONFIGS / "sandbox.yaml")))
        assert caught.value.reason is FaultReason.OVERLOADED
        client.cancel(first)
        client.wait_end(first)


def test_the_supervisor_process_imports_nothing_from_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "zmq.py").write_text("raise SystemExit('hijacked')")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import voidbus.cli.serve"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
