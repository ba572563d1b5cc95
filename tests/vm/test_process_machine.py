from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from machine_kit import WAIT, Guest, MachineConformance, MakeGuest, run, shell
from mount_kit import MountConformance
from watch_kit import FileWatchConformance, watch

from voidbus.vm.channel import ExecResult
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.descendants import descendants, stat_fields
from voidbus.vm.machine import MachineError, Mount
from voidbus.vm.process.machine import ProcessMachine


class TestProcessMachine(MachineConformance, FileWatchConformance, MountConformance):
    machine_type = ProcessMachine

    def test_it_says_that_it_does_not_isolate(self) -> None:
        assert (ProcessMachine.name, ProcessMachine.isolation) == ("process", "none")

    @pytest.mark.parametrize("victim", ["warden", "agent"])
    def test_a_crashed_guest_is_reported_and_takes_everything_with_it(
        self, guest: Guest, victim: str
    ) -> None:
        warden = guest.leases[0].pid
        assert warden is not None
        agent = next(pid for pid in descendants(warden) if int(stat_fields(pid)[1]) == warden)
        running = shell(guest.channel, "setsid sleep 71 & echo $!; wait")
        inner = os.pidfd_open(int(running.wait_for(b"\n")))
        try:
            os.kill(warden if victim == "warden" else agent, signal.SIGKILL)
            assert guest.exited.wait(WAIT)
            assert exits(inner)
        finally:
            os.close(inner)
        ending = running.ending()
        # A killed warden leaves the agent time to end its programs in order.
        assert isinstance(ending, ExecResult) or ending.reason == FaultReason.LOST
        with pytest.raises(ChannelFault):
            guest.channel.ping(WAIT)

    def test_everything_dies_with_the_host_process(self, tmp_path: Path) -> None:
        program = (
            "import sys,secrets,pathlib,threading\n"
            "from voidbus.vm.process.machine import ProcessMachine\n"
            "from voidbus.vm.machine import MachineSpec\n"
            "from voidbus.vm.channel import ExecCall\n"
            "s=MachineSpec('r','m',pathlib.Path(sys.argv[1]),secrets.token_bytes(32))\n"
            "m=ProcessMachine(s,on_exit=print,on_lease=lambda l:None)\n"
            "c=m.start(20)\n"
            "show=lambda _,d:print(d.decode(),end='',flush=True)\n"
            "call=ExecCall('sh',('-c','setsid sleep 72 & echo $!; wait'))\n"
            "c.exec(call,show,print)\n"
            "threading.Event().wait(60)\n"
        )
        host = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert host.stdout is not None
        inner = os.pidfd_open(int(host.stdout.readline()))
        try:
            host.kill()
            host.wait(WAIT)
            assert exits(inner)
        finally:
            os.close(inner)
            host.stdout.close()

    def test_a_stopped_warden_does_not_keep_the_machine_from_closing(self, guest: Guest) -> None:
        warden = guest.leases[0].pid
        assert warden is not None
        os.kill(warden, signal.SIGSTOP)
        guest.machine.close()
        assert guest.exited.is_set()

    def test_an_allowlist_written_before_the_first_program_is_in_force(self, guest: Guest) -> None:
        path = "/etc/voidbox/allowed_commands.json"
        guest.channel.write_file(path, b'["echo"]', WAIT)
        assert run(guest.channel, "echo", "x").exit_code == 0
        # Once programs run, the list can't be widened.
        guest.channel.write_file(path, b'["echo", "cat"]', WAIT)
        assert run(guest.channel, "cat").exit_code == -1

    def test_a_broken_allowlist_allows_nothing(self, guest: Guest) -> None:
        guest.channel.write_file("/etc/voidbox/allowed_commands.json", b"{", WAIT)
        result = run(guest.channel, "echo")
        assert result.error is not None
        assert "so nothing may run" in result.error

    def test_the_tools_are_on_the_path(self, guest: Guest) -> None:
        for tool in ("claudio", "claude-code", "void-message", "void-mcp"):
            found = run(guest.channel, "which", tool)
            assert found.stdout.decode().strip().endswith(f"/usr/local/bin/{tool}")

    def test_void_mcp_finds_the_files_it_is_made_of(self, guest: Guest) -> None:
        assert run(guest.channel, "void-mcp", "--help").stdout.startswith(b"usage: void-mcp")

    def test_a_start_that_fails_tells_what_the_console_said(self, make: MakeGuest) -> None:
        guest = make(scratch=Path("/proc/nowhere"))
        with pytest.raises(MachineError, match="m0: the guest agent could not be started"):
            guest.machine.start(WAIT)

    def test_a_read_only_mount_says_that_it_does_not_hold_programs(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        (tmp_path / "shared").mkdir()
        guest = make(
            mounts=(
                Mount(tmp_path / "shared", "/tmp/shared"),
                Mount(tmp_path / "other", "/home/sandbox/other", writable=True),
            )
        ).start()
        (warning,) = guest.machine.warnings
        assert warning.startswith("mount of /tmp/shared: a mock machine can't keep programs from")

    @pytest.mark.parametrize(
        "path",
        ["/", "/workspace", "/home/sandbox/", "/etc/voidbox/x", "/usr/x", "workspace/x",
         "/workspace/../etc", "/workspacex/y", "/home", "/workspace/\0", ""],
    )  # fmt: skip
    def test_a_mount_outside_its_own_directories_is_refused(
        self, make: MakeGuest, tmp_path: Path, path: str
    ) -> None:
        guest = make(mounts=(Mount(tmp_path / "shared", path, writable=True),))
        with pytest.raises(MachineError, match=r"m0: the mount at .* is not below one of"):
            guest.machine.start(WAIT)
        assert not (tmp_path / "shared").exists()

    @pytest.mark.parametrize("inner", ["/workspace/a", "/workspace/a/b", "/workspace//./a/c/d"])
    def test_a_mount_inside_another_is_refused(
        self, make: MakeGuest, tmp_path: Path, inner: str
    ) -> None:
        guest = make(
            mounts=(Mount(tmp_path, inner), Mount(tmp_path, "/workspace/a", writable=True))
        )
        with pytest.raises(MachineError, match="is inside the one at /workspace/a"):
            guest.machine.start(WAIT)

    def test_a_mount_of_a_file_fails_the_start(self, make: MakeGuest, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        guest = make(mounts=(Mount(tmp_path / "file", "/workspace/a"),))
        with pytest.raises(MachineError, match="file at /workspace/a could not be made: it is no"):
            guest.machine.start(WAIT)

    def test_removing_the_scratch_directory_leaves_what_was_mounted(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared/f").write_text("x")
        guest = make(mounts=(Mount(tmp_path / "shared", "/workspace/a", writable=True),)).start()
        guest.machine.close()
        shutil.rmtree(guest.machine.spec.scratch)
        assert (tmp_path / "shared/f").read_text() == "x"

    def test_a_watched_file_s_mount_may_be_taken_away_and_come_back(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        mount = Mount(tmp_path / "shared", "/workspace/a", writable=True)
        guest = make(mounts=(mount,)).start()
        told = watch(guest.channel, "/workspace/a/f")
        (tmp_path / "shared").rename(tmp_path / "old")
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared/f").write_text("12")
        told.wait_for_last(2)


def exits(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], WAIT)[0])
