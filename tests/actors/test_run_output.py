"""A run in one process: what its programs print, how they end, and the VM actor's part in it."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from actor_kit import PATIENCE
from journal_kit import a_run
from run_kit import RUN_ID, House, Notes, agent, workflow

from voidbus.actors.journal import Journal
from voidbus.actors.messages.journal import AppendEvents
from voidbus.actors.messages.machine import ExecOutput, MachineEnded, MachineStopped, StopMachine
from voidbus.actors.messages.run_process import RunConfig
from voidbus.actors.messages.runs import InspectRun, RunState, RunStatus, run_node
from voidbus.actors.recovery import recover
from voidbus.actors.run import RUN_PATH, RunActor
from voidbus.actors.run_process import RunProcess
from voidbus.actors.runtime.system import System
from voidbus.actors.spool import Spool
from voidbus.spec.run import RunSpec
from voidbus.transport.access import ipc_endpoints
from voidbus.transport.admission import token_digest
from voidbus.transport.delivery import Delivery
from voidbus.transport.envelope import BODY_LIMIT
from voidbus.transport.hub import Hub
from voidbus.transport.message import Right
from voidbus.vm.channel import ExecCall, ExecHandle, GuestChannel
from voidbus.vm.machine import StopStep
from voidbus.vm.process.machine import ProcessMachine

SANDBOX = {"kind": "sandbox", "name": "box", "sandbox": {"mode": "mock"}}


def a_waiting_step(house: House) -> Path:
    """A step that has said `up` and waits for somebody to write to a fifo."""
    fifo = house.folder / "fifo"
    os.mkfifo(fifo)
    house.start(workflow(f"wait: echo up; cat {fifo}", "after: echo done"))
    house.wait_message("up")
    return fifo


# -- floods and other bytes --------------------------------------------------------------------


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are spooled, in bytes."""
    sizes: list[int] = []
    add = Spool.add

    def measured(spool: Spool, batch: AppendEvents) -> None:
        sizes.append(len(batch.to_json()))
        add(spool, batch)

    monkeypatch.setattr(Spool, "add", measured)
    return sizes


def peak_memory() -> int:
    """The most memory this process has had since `forget_peak`, in bytes (proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def test_a_flood_is_cut_once_in_bounded_memory_and_harms_nobody(house: House) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = peak_memory()
    house.start(workflow("flood: yes | head -c 40000000", "after: wc -c"), log_limit=200_000)
    state = house.wait_over()
    assert state.status is RunStatus.SUCCEEDED
    assert state.report is not None
    assert state.report.output.strip() == str(1024 * 1024), "a pipe gets the first MiB"
    types = house.types()
    assert types.count("log.cut") == 1
    assert types.count("output.cut") == 1
    assert types.count("log.chunk") < 400
    assert types.index("log.cut") > max(n for n, t in enumerate(types) if t == "log.chunk")
    assert peak_memory() - before < 48 * 1024 * 1024


def test_a_line_of_ten_megabytes_is_kept_in_pieces(house: House, batches: list[int]) -> None:
    house.start(workflow("long: head -c 10000000 /dev/zero | tr '\\0' x"))
    assert house.wait_over().status is RunStatus.SUCCEEDED
    lines = house.log()
    assert sum(len(line) for line in lines) == 10_000_000
    assert max(len(line) for line in lines) == 8192
    assert max(batches) < BODY_LIMIT


def test_bytes_that_json_makes_longest_still_fit_in_messages(
    house: House, batches: list[int]
) -> None:
    house.start(workflow("odd: head -c 3000000 /dev/zero | tr '\\0' '\\001'"))
    state = house.wait_over()
    assert state.status is RunStatus.SUCCEEDED
    assert max(batches) < BODY_LIMIT
    assert len(state.to_json()) < BODY_LIMIT, "the run can be looked at afterwards"


def test_bytes_that_are_no_text_do_no_harm(house: House) -> None:
    house.start(workflow("odd: printf '\\377\\376 \\000 ok\\r\\n\\303'"))
    state = house.wait_over()
    assert state.status is RunStatus.SUCCEEDED
    assert house.log() == ["\ufffd\ufffd \ufffd ok", "\ufffd"]


def test_many_lines_at_once_are_journaled_without_a_gap(house: House) -> None:
    house.start(workflow("lines: seq 1 3000", "last: tail -n 1"))
    state = house.wait_over()
    assert house.log("lines") == [str(n) for n in range(1, 3001)]
    assert state.report is not None
    assert state.report.output == "3000\n"


def test_a_cancel_is_taken_at_once_while_output_floods(house: House) -> None:
    house.start(workflow("flood: yes"), log_limit=100_000)
    house.wait_type("log.cut")
    house.cancel(grace=5.0)
    assert house.wait_over().status is RunStatus.CANCELLED


@pytest.mark.parametrize(
    ("environment", "status", "error"),
    [
        ({"CLAUDIO_GARBAGE": "1"}, RunStatus.SUCCEEDED, None),
        ({"CLAUDIO_EXIT_CODE": "3"}, RunStatus.SUCCEEDED, None),
        (
            {"CLAUDIO_NO_OUTPUT": "1"},
            RunStatus.FAILED,
            "stage 'scout' completed without result.json",
        ),
        (
            {"CLAUDIO_OUTPUT": "plain words"},
            RunStatus.FAILED,
            "stage 'scout': its structured output is not JSON",
        ),
        ({"CLAUDIO_FAIL": "out of tokens"}, RunStatus.FAILED, "out of tokens"),
    ],
)
def test_an_agents_stream_decides_how_its_run_ends(
    house: House, environment: dict[str, str], status: RunStatus, error: str | None
) -> None:
    house.start(agent(messaging=False, **environment))
    state = house.wait_over()
    assert (state.status, state.error) == (status, error)


def test_a_program_past_its_limit_is_killed_and_says_so(house: House) -> None:
    os.mkfifo(house.folder / "never")
    spec = workflow(f"slow: cat {house.folder}/never")
    spec["workflow"]["steps"][0]["timeout_secs"] = 1
    house.start(spec)
    state = house.wait_over()
    assert state.error is not None
    assert "Process killed after 1s timeout" in state.error


def test_a_limit_of_ages_is_no_harm(house: House) -> None:
    spec = workflow("one: echo fine")
    spec["workflow"]["steps"][0]["timeout_secs"] = 2**63
    house.start(spec)
    assert house.wait_over().status is RunStatus.SUCCEEDED


def test_a_wide_level_is_started_whole(house: House) -> None:
    steps = [{"name": f"s{n}", "run": {"program": "echo", "args": [str(n)]}} for n in range(200)]
    house.start({"kind": "workflow", "name": "wide", "workflow": {"steps": steps}})
    assert house.wait_over().status is RunStatus.SUCCEEDED
    assert sorted(house.log(), key=int) == [str(n) for n in range(200)]


def test_a_run_that_ends_while_nobody_is_there_leaves_its_end_in_the_spool(
    house: House,
) -> None:
    fifo = a_waiting_step(house)
    house.hub.detach("journal")
    house.run.link_changed(False)
    fifo.write_text("go\n")
    assert house.over.wait(PATIENCE)
    house.hub.attach("journal", house.journal)
    state = house.ask("journal", InspectRun(run_id=RUN_ID))
    assert isinstance(state, RunState)
    assert state.status is RunStatus.RUNNING
    left = recover(state, house.folder, reason="it is gone", cancel_reason=None)
    for batch in left.batches:
        house.ask("journal", batch)
    assert house.wait_over().status is RunStatus.SUCCEEDED
    assert house.log() == ["up", "go", "done"]


def test_a_run_process_that_is_stopped_cancels_its_run(house: House) -> None:
    a_waiting_step(house)
    house.run.request_stop(PATIENCE)
    state = house.wait_over()
    assert (state.status, state.terminal_reason) == (
        RunStatus.CANCELLED,
        "the run process was asked to stop",
    )


# -- the VM actor's end of it ------------------------------------------------------------------


class DeafMachine(ProcessMachine):
    """Loses its channel and lives on."""

    channels: list[GuestChannel] = []  # noqa: RUF012

    def start(self, timeout: float) -> GuestChannel:
        channel = super().start(timeout)
        self.channels.append(channel)
        return channel


def test_a_lost_channel_ends_the_run_even_if_the_machine_lives(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("voidbus.actors.vm._END_SECONDS", 0.05)
    DeafMachine.channels.clear()
    fifo = house.folder / "fifo"
    os.mkfifo(fifo)
    house.start(workflow(f"wait: echo up; cat {fifo}"), machine=DeafMachine)
    house.wait_message("up")
    DeafMachine.channels[0]._broken("cut by the test")
    state = house.wait_over()
    assert state.error is not None
    assert "its guest channel was lost: exec of 'sh': cut by the test" in state.error


def test_a_program_killed_by_a_signal_is_a_failed_step_where_the_machine_lives(
    house: House,
) -> None:
    house.start(workflow("last: echo words; kill -9 $$"))
    state = house.wait_over()
    assert state.error == (
        "output step last did not succeed: Process killed by signal (exit_code mapped to -1)"
    )
    assert house.log() == ["words"]


class ShoutingMachine(ProcessMachine):
    """Its guest sends output in pieces as large as the protocol lets it."""

    def start(self, timeout: float) -> GuestChannel:
        channel = super().start(timeout)
        execute = channel.exec

        def shout(call: ExecCall, on_output: Any, on_done: Any) -> ExecHandle:
            def done(outcome: object) -> None:
                on_output("stdout", b"line\n" * 2_000_000)
                on_done(outcome)

            return execute(call, on_output, done)

        channel.exec = shout  # type: ignore[method-assign]
        return channel


def test_huge_pieces_of_output_are_taken_a_little_at_a_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    lines: list[int] = []
    taken = RunActor.on_exec_output

    def measured(run: RunActor, message: ExecOutput, delivery: Delivery) -> None:
        sizes.append(len(message.data))
        lines.append(message.data.count(b"\n"))
        taken(run, message, delivery)

    handlers: dict[Any, Any] = RunActor._handlers
    monkeypatch.setitem(handlers, ExecOutput, measured)
    house.start(workflow("one: true"), machine=ShoutingMachine, log_limit=100_000)
    assert house.wait_over().status is RunStatus.SUCCEEDED
    assert sum(sizes) == 10_000_000
    assert max(sizes) <= 65536
    assert max(lines) <= 256, "a cancel waits for one message, and each line is an event"


def test_stopping_a_machine_says_what_it_took(house: House) -> None:
    house.start(SANDBOX)
    house.wait_type("sandbox.ready")
    stopped = house.ask("vm", StopMachine(grace=5.0))
    assert isinstance(stopped, MachineStopped)
    assert stopped.step == StopStep.SHUTDOWN
    house.tell(RUN_PATH, MachineEnded(reason="asked"), sender="vm")
    assert house.wait_over().error == "the machine ended: asked"


def test_the_state_of_a_running_run_counts_what_is_active(house: House) -> None:
    fifo = a_waiting_step(house)
    state = house.ask("journal", InspectRun(run_id=RUN_ID))
    assert isinstance(state, RunState)
    assert (state.machine, state.active_stage_count, state.active_microvm_count) == (
        "process",
        1,
        1,
    )
    fifo.write_text("go")
    house.wait_over()


def test_a_run_process_joins_the_hub_by_itself_and_ends_with_its_run(house: House) -> None:
    """The whole of RunProcess, on a thread: a leaf over ipc, the bus between it and the journal."""
    with tempfile.TemporaryDirectory(prefix="vb-") as sockets:
        hub = Hub("supervisor", ipc_endpoints(Path(sockets)))
        system = System(hub)
        hub.attach("runs", Notes())
        hub.attach("telemetry", Notes())
        try:
            system.start(Journal, "journal", house.folder / "other.sqlite", "supervisor/runs")
            hub.ask("supervisor/journal", a_run(RUN_ID), timeout=PATIENCE).result()
            hub.expect(run_node(RUN_ID), token_digest("secret"), 1)
            config = RunConfig(
                run_id=RUN_ID,
                generation=1,
                token="secret",
                hub=hub.addresses[Right.WORK],
                directory=str(house.folder),
                artifacts=str(house.folder / "artifacts"),
                spec=RunSpec.model_validate(agent()).model_dump_json(by_alias=True),
                spec_name="agent.yaml",
                next_seq=2,
            )
            process = threading.Thread(target=lambda: run_to_its_end(RunProcess(config)))
            process.start()
            process.join(PATIENCE)
            assert not process.is_alive()
            state = hub.ask(
                "supervisor/journal", InspectRun(run_id=RUN_ID), timeout=PATIENCE
            ).result()
        finally:
            system.stop(PATIENCE)
            hub.close()
    assert isinstance(state, RunState)
    assert state.status is RunStatus.SUCCEEDED, state.error
    assert not (house.folder / "machine").exists()


def run_to_its_end(process: RunProcess) -> None:
    try:
        process.start()
        process.wait()
    finally:
        process.close()
