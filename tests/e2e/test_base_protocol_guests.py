"""A real guest whose agent knows the base protocol only, and no flag beyond it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_vm import with_init
from machine_kit import WAIT, Guest, MakeGuest, Running, machines_of, run, shell
from patience import SLOW
from supervisor_kit import running_supervisor
from vm_kit import BOOT_PATIENCE, leftovers, machine_processes, vm_workflow

from voidbus.actors.messages.runs import RunStatus
from voidbus.cli.event_line import log_text
from voidbus.vm.channel import ExecCall
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.handshake import Flags
from voidbus.vm.guest.telemetry_messages import TelemetryBatch
from voidbus.vm.machine import Machine, StopStep
from voidbus.vm.pty import PtyCall

pytestmark = pytest.mark.timeout(300 * SLOW)

# The image's own agent, to which no flag but MULTIPLEX exists: it neither offers nor sees another.
_BASE_AGENT = """#!/usr/bin/python3.11 -IS
import sys
sys.path.append("/usr/lib/voidbus")
from guest import handshake
handshake.EVERYTHING = handshake.BASE_PROTOCOL
from guest.init import main
sys.exit(main())
"""

ALLOWED = ("sh", "cat")


@pytest.fixture(scope="module")
def guest(kind: type[Machine], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One machine for the tests that leave it as they found it."""
    folder = tmp_path_factory.mktemp("base")
    with machines_of(kind, folder) as make:
        image = with_init(folder, _BASE_AGENT)
        started = make(**image, env={"GREETING": "hello"}, allowed_commands=ALLOWED).start()
        assert started.channel.flags == Flags.MULTIPLEX
        yield started


def test_a_program_gets_its_input_and_environment_and_reports_outputs_and_exit_code(
    guest: Guest,
) -> None:
    given = os.urandom(200_000)
    echoed = Running(guest.channel, ExecCall("cat", stdin=given))
    assert echoed.result().stdout == given
    assert echoed.output == given
    script = "echo $GREETING $OWN; echo err >&2; exit 7"
    result = Running(guest.channel, ExecCall("sh", ("-c", script), env=(("OWN", "x"),))).result()
    assert (result.stdout, result.exit_code) == (b"hello x\n", 7)
    assert result.stderr.startswith(b"err\n")


def test_output_comes_while_its_program_runs(guest: Guest) -> None:
    # No other request would be answered meanwhile, so only time lets this program go on.
    running = shell(guest.channel, "echo first; sleep 3; echo second")
    assert b"second" not in running.wait_for(b"first")
    assert running.result().stdout == b"first\nsecond\n"


def test_requests_made_at_once_are_all_answered_one_after_the_other(guest: Guest) -> None:
    running = [shell(guest.channel, f"echo {number}") for number in range(8)]
    assert [each.result().stdout for each in running] == [b"%d\n" % n for n in range(8)]


def test_a_program_that_takes_too_long_is_ended_by_the_guest(guest: Guest) -> None:
    result = shell(guest.channel, "sleep 60", timeout=1).result()
    assert (result.exit_code, result.error) == (-1, "Process killed after 1s timeout")


def test_the_list_of_allowed_programs_holds(guest: Guest) -> None:
    assert run(guest.channel, "id").error == "Command 'id' is not in the allowed commands list"


def test_files_are_written_read_and_looked_at(guest: Guest) -> None:
    content = os.urandom(300_000)
    guest.channel.mkdir("/workspace/a", WAIT)
    guest.channel.write_file("/workspace/a/b/file", content, WAIT)
    assert guest.channel.read_file("/workspace/a/b/file", WAIT) == content
    stat = guest.channel.file_stat("/workspace/a/b/file", WAIT)
    assert (stat.exists, stat.size) == (True, len(content))
    assert not guest.channel.file_stat("/workspace/a/none", WAIT).exists
    with pytest.raises(ChannelFault) as refused:
        guest.channel.write_file("/usr/file", b"", WAIT)
    assert refused.value.reason == FaultReason.REFUSED


def test_a_terminal_takes_input_and_a_new_size_and_tells_its_exit_code(guest: Guest) -> None:
    seen: list[bytes] = []
    codes: list[int | ChannelFault] = []
    asked, ended = threading.Event(), threading.Event()

    def on_data(data: bytes) -> None:
        seen.append(data)
        if b"ready" in b"".join(seen):
            asked.set()

    def on_closed(code: int | ChannelFault) -> None:
        codes.append(code)
        ended.set()

    script = "stty size; echo ready; read word; echo got $word; stty size; exit 5"
    call = PtyCall("sh", ("-c", script), cols=90, rows=30)
    pty = guest.channel.open_pty(call, on_data, on_closed, WAIT)
    assert asked.wait(WAIT)
    pty.resize(120, 40)
    pty.write(b"it\n")
    assert ended.wait(WAIT)
    assert codes == [5]
    words = b"".join(seen).split()
    assert words == [b"30", b"90", b"ready", b"it", b"got", b"it", b"40", b"120"]


def test_samples_come(guest: Guest) -> None:
    sampled = threading.Event()
    batches: list[TelemetryBatch] = []

    def on_batch(batch: TelemetryBatch) -> None:
        batches.append(batch)
        sampled.set()

    guest.channel.subscribe_telemetry(100, on_batch)
    assert sampled.wait(WAIT)
    assert batches[0].system is not None
    assert batches[0].system.memory_total_bytes > 0


def test_what_only_an_extension_can_is_refused_and_harms_nothing(guest: Guest) -> None:
    with pytest.raises(ChannelFault) as refused:
        guest.channel.listen_forward(0, ("127.0.0.1", 9), WAIT)
    assert refused.value.reason == FaultReason.UNSUPPORTED
    running = shell(guest.channel, "echo up; sleep 1")
    running.wait_for(b"up")
    assert not running.handle.signal(9)
    assert running.result().exit_code == 0


def test_it_turns_itself_off_when_asked(make: MakeGuest, tmp_path: Path) -> None:
    guest = make(**with_init(tmp_path, _BASE_AGENT)).start()
    assert run(guest.channel, "cat", stdin=b"up").stdout == b"up"
    assert guest.machine.stop(WAIT) is StopStep.SHUTDOWN
    assert guest.exited.wait(WAIT)
    assert guest.exits[0].reason == "stopped"


def test_a_whole_run_works_and_one_is_cancelled_while_its_program_holds_the_guest(
    kind: type[Machine], tmp_path: Path
) -> None:
    image = {"mode": kind.name} | {
        name: str(path) for name, path in with_init(tmp_path, _BASE_AGENT).items()
    }
    steps = (("make", "echo kept > note"), ("show", "cat note"))
    with running_supervisor() as supervisor, supervisor.connect() as client:
        run_id = client.start(vm_workflow(tmp_path, *steps, **image))
        state = client.wait_end(run_id, BOOT_PATIENCE)
        assert (state.status, state.error) == (RunStatus.SUCCEEDED, None)
        assert "kept" in [log_text(event) for event in client.events(run_id)]
        busy = vm_workflow(tmp_path, ("busy", "echo up; sleep 600"), name="busy", **image)
        run_id = client.start(busy)
        client.wait_for(run_id, lambda event: log_text(event) == "up", BOOT_PATIENCE)
        assert len(machine_processes(supervisor)) == 1
        client.cancel(run_id, grace=0.5)
        assert client.wait_end(run_id, BOOT_PATIENCE).status == RunStatus.CANCELLED
        assert machine_processes(supervisor) == [], "it is cancelled only when its machine is gone"
        assert leftovers(supervisor, run_id) == []
