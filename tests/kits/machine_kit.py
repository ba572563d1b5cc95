"""What every machine backend must do. Subclass ``MachineConformance`` and set ``machine_type``.

Tests that leave a machine as they found it share one (``shared``); the others start their own
(``guest``, or ``make`` where it must be a special one)."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import pytest

from voidbus.vm.channel import ExecCall, ExecHandle, ExecResult, GuestChannel
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.descendants import descendants
from voidbus.vm.guest.telemetry_messages import TelemetryBatch
from voidbus.vm.machine import (
    Forward,
    Lease,
    Machine,
    MachineError,
    MachineExit,
    MachineSpec,
    StopStep,
)
from voidbus.vm.pty import PtyCall

WAIT = 60.0

START_WAIT = 90.0
"""Seconds for a start: an emulated guest on a busy machine takes long to boot."""

MARK = str(100_000_000 + os.getpid())
"""A number of seconds to sleep by which this test run knows its own processes."""

BIG = 64_000_000
BIG_WAIT = 120.0


class Guest:
    """A machine under test and what it reported."""

    def __init__(self, machine_type: type[Machine], spec: MachineSpec) -> None:
        self.exits: list[MachineExit] = []
        self.leases: list[Lease] = []
        self.exited = threading.Event()
        self.leased = threading.Event()
        self.machine = machine_type(spec, on_exit=self._exit, on_lease=self._lease)
        self.channel: GuestChannel

    def _exit(self, reported: MachineExit) -> None:
        self.exits.append(reported)
        self.exited.set()

    def _lease(self, lease: Lease) -> None:
        self.leases.append(lease)
        self.leased.set()

    def start(self) -> Guest:
        self.channel = self.machine.start(START_WAIT)
        return self


class Running:
    """An exec under way, its output collected."""

    def __init__(self, channel: GuestChannel, call: ExecCall) -> None:
        self.output = b""
        self.chunks: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        self._results: list[ExecResult | ChannelFault] = []
        self.handle: ExecHandle = channel.exec(call, self._on_output, self._on_done)

    def _on_output(self, stream: str, data: bytes) -> None:
        with self._changed:
            self.output += data
            self.chunks.append((stream, data))
            self._changed.notify_all()

    def _on_done(self, result: ExecResult | ChannelFault) -> None:
        with self._changed:
            self._results.append(result)
            self._changed.notify_all()

    def wait_for(self, text: bytes) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: text in self.output, WAIT), self.output
            return self.output

    def ending(self) -> ExecResult | ChannelFault:
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self._results), WAIT)
            assert len(self._results) == 1
            return self._results[0]

    def result(self) -> ExecResult:
        ending = self.ending()
        assert isinstance(ending, ExecResult), ending
        return ending


def run(
    channel: GuestChannel, *argv: str, stdin: bytes = b"", timeout: int | None = 20
) -> ExecResult:
    return Running(channel, ExecCall(argv[0], argv[1:], stdin=stdin, timeout=timeout)).result()


def shell(channel: GuestChannel, script: str, timeout: int | None = 20) -> Running:
    return Running(channel, ExecCall("sh", ("-c", script), timeout=timeout))


MakeGuest = Callable[..., Guest]


@contextlib.contextmanager
def machines_of(machine_type: type[Machine], folder: Path, **usual: object) -> Iterator[MakeGuest]:
    """Makes machines, with these fields of their specification where a test says nothing else; at
    the end they are closed, and nothing of them is left."""
    guests: list[Guest] = []

    def build(**changes: object) -> Guest:
        scratch = folder / f"m{len(guests)}"
        scratch.mkdir()
        fields: dict[str, object] = {
            "run_id": "run-1",
            "name": f"m{len(guests)}",
            "scratch": scratch,
            "secret": secrets.token_bytes(32),
            **usual,
            **changes,
        }
        guests.append(Guest(machine_type, MachineSpec(**fields)))  # type: ignore[arg-type]
        return guests[-1]

    threads, files, processes = set(threading.enumerate()), open_files(), living()
    try:
        yield build
    finally:
        for guest in guests:
            guest.machine.close()
    assert set(threading.enumerate()) - threads == set()
    # What earlier tests left to the garbage collector may go at any time: only more is a leak.
    assert not Counter(open_files()) - Counter(files)
    assert living() - processes == set()
    assert not [path for guest in guests for path in guest.machine.spec.scratch.rglob("*.sock")]


def living() -> set[int]:
    """The processes below this one that run."""
    return {pid for pid, state in descendants(os.getpid()).items() if state != "Z"}


class MachineFixtures:
    """Machines of one kind for the tests of a class: each its own, or one for all."""

    machine_type: type[Machine]
    fields: ClassVar[dict[str, object]] = {}
    """What else the machines' specification says."""

    @pytest.fixture
    def make(self, tmp_path: Path) -> Iterator[MakeGuest]:
        with machines_of(self.machine_type, tmp_path, **self.fields) as make:
            yield make

    @pytest.fixture
    def guest(self, make: MakeGuest) -> Guest:
        return make().start()

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
        folder = tmp_path_factory.mktemp("shared")
        with machines_of(cls.machine_type, folder, **cls.fields) as make:
            yield make().start()


class MachineConformance(MachineFixtures):
    # -- exec -----------------------------------------------------------------------------

    def test_a_program_reports_its_output_on_both_streams_and_its_exit_code(
        self, shared: Guest
    ) -> None:
        running = shell(shared.channel, "echo out; echo err >&2; exit 7")
        result = running.result()
        assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 7)
        assert sorted(running.chunks) == [("stderr", b"err\n"), ("stdout", b"out\n")]

    def test_a_program_reads_all_of_its_input_and_then_its_end(self, shared: Guest) -> None:
        data = os.urandom(1_000_000)
        running = Running(shared.channel, ExecCall("cat", stdin=data))
        running.result()
        assert running.output == data

    def test_a_program_without_input_finds_an_empty_one(self, shared: Guest) -> None:
        assert run(shared.channel, "cat").stdout == b""

    def test_output_arrives_while_the_program_still_runs(self, shared: Guest) -> None:
        running = shell(shared.channel, "echo first; exec sleep 60")
        running.wait_for(b"first\n")
        assert running.handle.signal(signal.SIGTERM)
        result = running.result()
        assert (result.exit_code, result.signal) == (-1, signal.SIGTERM)
        assert result.error == "Process killed by signal (exit_code mapped to -1)"

    def test_a_program_past_its_time_is_killed_and_says_so(self, shared: Guest) -> None:
        result = run(shared.channel, "sleep", "60", timeout=1)
        assert (result.exit_code, result.error) == (-1, "Process killed after 1s timeout")

    def test_a_timeout_kills_also_what_left_the_process_group(self, shared: Guest) -> None:
        running = shell(shared.channel, f"setsid sleep 61{MARK} & echo $!; wait", timeout=1)
        assert running.result().exit_code == -1
        # Both streams ended, so nobody holds them any more.
        assert (
            shell(shared.channel, f"ps ax | grep -c '[s]leep 61{MARK}'").result().stdout == b"0\n"
        )

    def test_a_signal_reaches_the_whole_process_group(self, shared: Guest) -> None:
        running = shell(shared.channel, f"sleep 62{MARK} & echo ready; sleep 62{MARK}")
        running.wait_for(b"ready")
        running.handle.signal(signal.SIGKILL)
        running.result()
        assert (
            shell(shared.channel, f"ps ax | grep -c '[s]leep 62{MARK}'").result().stdout == b"0\n"
        )

    def test_a_program_that_is_not_there_is_an_error_and_not_a_fault(self, shared: Guest) -> None:
        result = run(shared.channel, "no-such-program")
        assert result.exit_code == -1
        assert result.error is not None
        assert "no-such-program" in result.error

    def test_only_allowed_programs_run_from_the_first_one_on(self, make: MakeGuest) -> None:
        channel = make(allowed_commands=("echo",)).start().channel
        refused = run(channel, "/bin/cat", "/etc/passwd")
        assert refused.error == "Command '/bin/cat' is not in the allowed commands list"
        assert run(channel, "/bin/echo", "fine").stdout == b"fine\n"

    def test_the_environment_of_the_machine_and_the_call_reach_the_program(
        self, make: MakeGuest
    ) -> None:
        channel = make(env={"A": "machine", "B": "machine"}).start().channel
        call = ExecCall("sh", ("-c", 'echo "$A $B"; cd "$VOID_WORKSPACE"; pwd'), (("B", "call"),))
        lines = Running(channel, call).result().stdout.decode().splitlines()
        assert lines[0] == "machine call"
        assert lines[1].endswith("/workspace")

    def test_a_program_starts_in_the_workspace_and_finds_what_was_written_there(
        self, shared: Guest
    ) -> None:
        shared.channel.write_file("/workspace/in.txt", b"hello", WAIT)
        assert run(shared.channel, "cat", "in.txt").stdout == b"hello"
        assert run(shared.channel, "cat", "/workspace/in.txt").stdout == b"hello"

    @pytest.mark.parametrize("folder", ["/workspace", "/workspace/sub", "sub", "/home/sandbox"])
    def test_a_program_starts_in_the_working_directory_it_is_given(
        self, shared: Guest, folder: str
    ) -> None:
        shared.channel.mkdir("/workspace/sub", WAIT)
        result = Running(shared.channel, ExecCall("pwd", working_dir=folder)).result()
        assert (result.exit_code, result.error) == (0, None)
        assert result.stdout.decode().strip().endswith(folder)

    def test_a_working_directory_that_is_not_there_is_an_error_of_that_program(
        self, shared: Guest
    ) -> None:
        call = ExecCall("pwd", working_dir="/workspace/nowhere")
        expected = (
            "could not start 'pwd': working directory /workspace/nowhere: No such file or directory"
        )
        assert Running(shared.channel, call).result().error == expected
        with pytest.raises(ChannelFault, match="working directory /workspace/nowhere: No such"):
            shared.channel.open_pty(
                PtyCall("pwd", working_dir="/workspace/nowhere"),
                lambda _: None,
                lambda _: None,
                WAIT,
            )
        assert run(shared.channel, "pwd").exit_code == 0

    def test_output_larger_than_memory_for_it_keeps_its_end_and_is_flagged(
        self, shared: Guest
    ) -> None:
        total = 0
        done = threading.Event()
        results: list[ExecResult | ChannelFault] = []

        def count(_: str, data: bytes) -> None:
            nonlocal total
            total += len(data)

        def finish(result: ExecResult | ChannelFault) -> None:
            results.append(result)
            done.set()

        script = "head -c 20000000 /dev/zero; echo end"
        shared.channel.exec(ExecCall("sh", ("-c", script)), count, finish)
        assert done.wait(WAIT)
        assert total == 20_000_004
        assert isinstance(results[0], ExecResult)
        assert results[0].truncated
        assert results[0].stdout.endswith(b"\0end\n")
        assert len(results[0].stdout) == 1024 * 1024

    def test_a_slow_consumer_blocks_the_program_instead_of_filling_memory(
        self, shared: Guest
    ) -> None:
        go_on = threading.Event()
        done = threading.Event()

        def slow(_: str, data: bytes) -> None:
            go_on.wait(WAIT)

        script = "yes | head -c 12000000; echo written >&2"
        shared.channel.exec(ExecCall("sh", ("-c", script)), slow, lambda _: done.set())
        # While the consumer sleeps the program can't finish: its output has nowhere to go.
        assert not done.wait(0.5)
        go_on.set()
        assert done.wait(WAIT)

    # -- many at a time -------------------------------------------------------------------

    def test_a_hundred_programs_run_at_once(self, shared: Guest) -> None:
        runs = [Running(shared.channel, ExecCall("echo", (str(n),))) for n in range(100)]
        assert [running.result().stdout for running in runs] == [b"%d\n" % n for n in range(100)]

    def test_file_requests_are_answered_while_a_program_runs(self, shared: Guest) -> None:
        running = shell(shared.channel, "echo up; exec sleep 60")
        running.wait_for(b"up")
        shared.channel.write_file("/workspace/x", b"1", WAIT)
        assert shared.channel.read_file("/workspace/x", WAIT) == b"1"
        running.handle.signal(signal.SIGKILL)
        running.result()

    def test_a_hundred_requests_at_once_all_get_their_own_answers(self, shared: Guest) -> None:
        def round_trip(number: int) -> bool:
            path = f"/workspace/many/{number}"
            shared.channel.write_file(path, b"%d" % number, WAIT)
            return shared.channel.read_file(path, WAIT) == b"%d" % number

        with ThreadPoolExecutor(20) as pool:
            assert all(pool.map(round_trip, range(100)))

    # -- files ----------------------------------------------------------------------------

    def test_a_big_file_goes_in_and_comes_out_unchanged(self, shared: Guest) -> None:
        data = os.urandom(BIG)
        shared.channel.write_file("/workspace/big", data, BIG_WAIT)
        assert shared.channel.file_stat("/workspace/big", WAIT).size == BIG
        assert shared.channel.read_file("/workspace/big", BIG_WAIT) == data

    def test_directories_are_made_with_those_above_them(self, shared: Guest) -> None:
        shared.channel.mkdir("/workspace/a/b/c", WAIT)
        assert shared.channel.file_stat("/workspace/a/b/c", WAIT).exists
        assert not shared.channel.file_stat("/workspace/nothing", WAIT).exists

    @pytest.mark.parametrize(
        "path", ["/etc/passwd", "/workspace/../etc/passwd", "workspace/x", "/", "/workspacex/y"]
    )
    def test_files_outside_the_roots_are_refused(self, shared: Guest, path: str) -> None:
        with pytest.raises(ChannelFault) as caught:
            shared.channel.read_file(path, WAIT)
        assert caught.value.reason == FaultReason.REFUSED
        with pytest.raises(ChannelFault):
            shared.channel.write_file(path, b"", WAIT)

    def test_no_link_leads_out_of_the_workspace(self, shared: Guest) -> None:
        shell(shared.channel, "ln -s /etc out; ln -s /etc/passwd file; mkfifo pipe").result()
        for path in ("/workspace/out/passwd", "/workspace/file", "/workspace/pipe"):
            with pytest.raises(ChannelFault):
                shared.channel.read_file(path, WAIT)
            with pytest.raises(ChannelFault):
                shared.channel.write_file(path, b"x", WAIT)

    # -- terminals ------------------------------------------------------------------------

    def test_a_terminal_has_a_size_that_can_change_and_an_exit_code(self, shared: Guest) -> None:
        seen: list[bytes] = []
        changed = threading.Condition()
        closed: list[int | ChannelFault] = []

        def data(part: bytes) -> None:
            with changed:
                seen.append(part)
                changed.notify_all()

        def ended(code: int | ChannelFault) -> None:
            with changed:
                closed.append(code)
                changed.notify_all()

        call = PtyCall("sh", ("-c", "stty size; read x; stty size; exit 5"), cols=90, rows=30)
        pty = shared.channel.open_pty(call, data, ended, WAIT)
        with changed:
            assert changed.wait_for(lambda: b"30 90" in b"".join(seen), WAIT), seen
        pty.resize(100, 40)
        pty.write(b"go\n")
        with changed:
            assert changed.wait_for(lambda: bool(closed), WAIT)
            assert b"40 100" in b"".join(seen)
            assert closed == [5]

    def test_a_closed_terminal_hangs_its_program_up(self, shared: Guest) -> None:
        closed: list[int | ChannelFault] = []
        call = PtyCall("sleep", ("63",), interactive=True)
        pty = shared.channel.open_pty(call, lambda _: None, closed.append, WAIT)
        pty.close(WAIT)
        assert closed == [128 + signal.SIGHUP]

    def test_a_fifth_terminal_is_refused(self, guest: Guest) -> None:
        call = PtyCall("sleep", ("64",), interactive=True)
        for _ in range(4):
            guest.channel.open_pty(call, lambda _: None, lambda _: None, WAIT)
        with pytest.raises(ChannelFault, match=r"max PTY sessions \(4\) reached"):
            guest.channel.open_pty(call, lambda _: None, lambda _: None, WAIT)

    # -- telemetry and ports --------------------------------------------------------------

    def test_telemetry_counts_what_runs_in_the_machine(self, shared: Guest) -> None:
        found = threading.Event()
        running = shell(shared.channel, "echo up; exec sleep 65")
        running.wait_for(b"up")

        def look(batch: TelemetryBatch) -> None:
            if any(process.comm == "sleep" for process in batch.processes):
                found.set()

        shared.channel.subscribe_telemetry(100, look)
        assert found.wait(WAIT)
        running.handle.signal(signal.SIGKILL)
        running.result()

    def test_a_forwarded_port_leads_to_its_host_endpoint_and_back(self, make: MakeGuest) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            guest = make(forwards=(Forward(0, ("127.0.0.1", port)),)).start()
            inside = guest.channel.forwards[0]
            data = os.urandom(2_000_000)

            def echo() -> None:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(WAIT)
                    while part := connection.recv(65536):
                        connection.sendall(part)

            thread = threading.Thread(target=echo)
            thread.start()
            guest.channel.write_file("/workspace/data", data, WAIT)
            script = (
                "import socket,sys,threading\n"
                f"s=socket.create_connection(('127.0.0.1',{inside}))\n"
                "d=open('data','rb').read()\n"
                "t=threading.Thread(target=lambda:(s.sendall(d),s.shutdown(1)))\n"
                "t.start()\n"
                "got=b''\n"
                "while p:=s.recv(65536): got+=p\n"
                "t.join()\n"
                "print(got==d)\n"
            )
            assert run(guest.channel, "python3", "-c", script).stdout == b"True\n"
            thread.join(WAIT)

    def test_a_new_channel_takes_the_forwarded_ports_over(self, make: MakeGuest) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        guest = make(forwards=(Forward(port, Path("/nowhere")),)).start()
        assert guest.machine.reconnect(WAIT).forwards == {port: port}

    # -- ends -----------------------------------------------------------------------------

    def test_a_lost_connection_ends_pending_calls_and_another_can_be_made(
        self, guest: Guest
    ) -> None:
        running = shell(guest.channel, f"echo up; exec sleep 66{MARK}")
        running.wait_for(b"up")
        guest.channel.close()
        ending = running.ending()
        assert isinstance(ending, ChannelFault)
        assert ending.reason == FaultReason.CLOSED
        again = guest.machine.reconnect(WAIT)
        count = shell(
            again,
            f"for i in 1 2 3 4 5 6 7 8 9; do ps ax | grep '[s]leep 66{MARK}' || exit 0;"
            "sleep 0.1; done; exit 1",
        )
        assert count.result().exit_code == 0

    def test_a_stop_ends_a_busy_guest_in_order_and_says_so_once(self, guest: Guest) -> None:
        running = shell(guest.channel, "trap '' TERM; echo up; while :; do sleep 67; done")
        running.wait_for(b"up")
        began = time.monotonic()
        assert guest.machine.stop(5) == StopStep.SHUTDOWN
        assert time.monotonic() - began < 5
        ending = running.ending()  # the guest may still have told how its program was killed
        assert isinstance(ending, ChannelFault) or ending.exit_code == -1
        assert guest.exited.wait(WAIT)
        assert guest.machine.stop(5) == StopStep.ALREADY_GONE
        assert [reported.reason for reported in guest.exits] == ["stopped"]

    def test_a_stop_during_the_start_ends_the_start(self, make: MakeGuest) -> None:
        guest = make()
        errors: list[MachineError] = []

        def start() -> None:
            try:
                guest.machine.start(WAIT)
            except MachineError as error:
                errors.append(error)

        thread = threading.Thread(target=start)
        thread.start()
        assert guest.leased.wait(WAIT)
        guest.machine.stop(1)
        thread.join(WAIT)
        assert not thread.is_alive()
        # The start may just have won; then the machine is stopped all the same.
        assert all("stopped" in str(error) for error in errors)
        assert guest.exited.wait(WAIT)

    def test_a_lease_is_reported_before_the_start_returns(self, shared: Guest) -> None:
        assert shared.leases

    def test_a_kill_ends_everything_at_once(self, guest: Guest) -> None:
        running = shell(guest.channel, "echo up; setsid sleep 68")
        running.wait_for(b"up")
        guest.machine.kill()
        assert guest.exited.wait(WAIT)
        ending = running.ending()
        assert isinstance(ending, ChannelFault) or ending.exit_code == -1


def open_files() -> list[str]:
    """What this process's descriptors lead to, one entry each; without numbers that differ."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(re.sub(r"\d+", "N", str(entry.readlink())))
    return found
