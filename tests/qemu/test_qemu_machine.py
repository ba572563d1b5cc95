from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from guest_vm import eventually
from machine_kit import (
    START_WAIT,
    WAIT,
    Guest,
    MachineConformance,
    MakeGuest,
    Running,
    run,
    shell,
)
from mount_kit import MountConformance
from watch_kit import FileWatchConformance

from voidbus.vm.channel import GuestChannel
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.descendants import stat_fields
from voidbus.vm.image.cpio import directory, write_archive
from voidbus.vm.image.store import default_store
from voidbus.vm.machine import MachineError, Mount
from voidbus.vm.qemu.command import MAX_DEVICES
from voidbus.vm.qemu.devices import VSOCK_SOCKET
from voidbus.vm.qemu.machine import QemuMachine
from voidbus.vm.qemu.user import qemu_user

pytestmark = [pytest.mark.needs("vm"), pytest.mark.timeout(240)]


def status_of(pid: int) -> dict[str, str]:
    """What the kernel says of a process (proc_pid_status(5))."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def switches_of(thread: int) -> int:
    """How often a thread of this process has waited for something (proc_pid_status(5))."""
    text = Path(f"/proc/self/task/{thread}/status").read_text()
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def serve_once(channel: GuestChannel, port: int) -> Running:
    """A program in the guest that listens on a vsock port, and answers one connection with what
    that said, in capitals."""
    script = (
        "import socket,sys\n"
        "s=socket.socket(socket.AF_VSOCK)\n"
        "s.bind((-1,int(sys.argv[1])))\n"
        "s.listen()\n"
        "print('up',flush=True)\n"
        "c,_=s.accept()\n"
        "c.sendall(c.makefile('rb').readline().upper())\n"
    )
    channel.write_file("/workspace/vsock.py", script.encode(), WAIT)
    running = shell(channel, f"python3 vsock.py {port}")
    running.wait_for(b"up")
    return running


def make_mounts(folder: Path, count: int) -> tuple[Mount, ...]:
    """Directories with a file each, and long paths in the guest; every other one is writable."""
    mounts = []
    for number in range(count):
        given = folder / f"given{number}"
        given.mkdir()
        (given / "name").write_text(f"{number}\n")
        guest_path = f"/data/a-rather-long-name-for-a-directory/of-the-guest/{number}"
        mounts.append(Mount(given, guest_path, writable=number % 2 == 1))
    return tuple(mounts)


class TestQemuMachine(MachineConformance, FileWatchConformance, MountConformance):
    machine_type = QemuMachine

    def test_it_says_that_it_isolates(self) -> None:
        assert (QemuMachine.name, QemuMachine.isolation) == ("qemu", "vm")

    def test_programs_run_as_a_user_without_privileges(self, shared: Guest) -> None:
        result = shell(shared.channel, "id -u; id -G; grep NoNewPrivs /proc/self/status").result()
        assert result.stdout.split() == [b"1000", b"1000", b"NoNewPrivs:", b"1"]

    def test_the_secret_is_nowhere_a_program_can_read(self, shared: Guest) -> None:
        secret = shared.machine.spec.secret.hex()
        script = "cat /proc/cmdline /proc/1/environ /proc/1/cmdline; dmesg; env"
        result = shell(shared.channel, script).result()
        assert b"console=ttyS0" in result.stdout
        assert secret.encode() not in result.stdout + result.stderr
        assert secret.encode() not in shared.machine.console()

    def test_the_secret_is_nowhere_others_on_the_host_can_read(self, shared: Guest) -> None:
        pid = shared.leases[0].pid
        for name in ("cmdline", "environ"):
            held = Path(f"/proc/{pid}/{name}").read_bytes()
            assert shared.machine.spec.secret.hex().encode() not in held

    def test_qemu_may_do_next_to_nothing_on_the_host(self, shared: Guest) -> None:
        status = status_of(shared.leases[0].pid or 0)
        for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["NoNewPrivs"] == "1"
        assert status["Seccomp"] == "2"  # a filter (proc_pid_status(5))

    @pytest.mark.needs("root")
    def test_qemu_of_root_is_a_user_of_its_own(self, shared: Guest) -> None:
        pid = shared.leases[0].pid or 0
        status = status_of(pid)
        user = qemu_user("tcg")
        assert user is not None
        assert user.uid not in (0, os.getuid())
        assert status["Uid"].split() == [str(user.uid)] * 4
        assert status["Gid"].split() == [str(user.gid)] * 4
        assert status["Groups"].split() == []
        assert int(status["CapBnd"], 16) == 0

    def test_qemu_holds_no_descriptor_but_what_it_was_handed(self, shared: Guest) -> None:
        folder = Path(f"/proc/{shared.leases[0].pid}/fd")
        held = {str(path.readlink()) for path in folder.iterdir()}
        image = default_store().current()
        known = {"/dev/null", "/dev/kvm", os.fspath(image.kernel), os.fspath(image.initramfs)}
        kinds = ("pipe:", "socket:", "anon_inode:", "/memfd:")
        assert [name for name in held - known if not name.startswith(kinds)] == []

    def test_a_program_of_the_host_reaches_a_port_of_the_guest_by_the_socket(
        self, shared: Guest
    ) -> None:
        path = shared.machine.spec.scratch / VSOCK_SOCKET
        running = serve_once(shared.channel, 9000)
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(WAIT)
            client.connect(os.fspath(path))
            client.sendall(b"CONNECT 9000\n")
            lines = client.makefile("rb")
            assert lines.readline().startswith(b"OK ")
            client.sendall(b"hello\n")
            assert lines.read() == b"HELLO\n"
            lines.close()
        assert running.result().exit_code == 0

    @pytest.mark.needs("socat")
    def test_socat_reaches_a_port_of_the_guest(self, shared: Guest) -> None:
        path = shared.machine.spec.scratch / VSOCK_SOCKET
        running = serve_once(shared.channel, 9001)
        # It waits that long for the guest's word after the end of its input.
        socat = subprocess.run(
            ["socat", f"-t{WAIT:.0f}", "-", f"UNIX-CONNECT:{path}"],
            input=b"CONNECT 9001\nhello from socat\n",
            capture_output=True,
            timeout=WAIT,
            check=True,
        )
        greeting, _, answer = socat.stdout.partition(b"\n")
        assert re.fullmatch(rb"OK \d+", greeting)
        assert answer == b"HELLO FROM SOCAT\n"
        assert running.result().exit_code == 0

    def test_a_terminated_qemu_is_reported_with_its_own_words(self, guest: Guest) -> None:
        os.kill(guest.leases[0].pid or 0, signal.SIGTERM)
        assert guest.exited.wait(WAIT)
        assert guest.exits[0].reason.startswith("QEMU was terminated by a signal; QEMU said: ")

    def test_a_killed_qemu_is_reported_and_pending_calls_end(self, guest: Guest) -> None:
        running = shell(guest.channel, "echo up; sleep 60")
        running.wait_for(b"up")
        os.kill(guest.leases[0].pid or 0, signal.SIGKILL)
        assert guest.exited.wait(WAIT)
        assert guest.exits[0].reason == "QEMU was killed by SIGKILL"
        ending = running.ending()
        assert isinstance(ending, ChannelFault)
        assert ending.reason == FaultReason.LOST

    def test_an_idle_machine_wakes_no_thread_of_ours(self, make: MakeGuest) -> None:
        others = {thread.native_id for thread in threading.enumerate()}
        guest = make().start()
        run(guest.channel, "true")
        ours = [t.native_id for t in threading.enumerate() if t.native_id not in others]
        assert len(ours) >= 4  # QEMU's owner, the vsock device, the channel's reader and sender
        pause = threading.Event()

        def wake_ups() -> int:
            before = sum(switches_of(thread) for thread in ours if thread)
            pause.wait(2.0)
            return sum(switches_of(thread) for thread in ours if thread) - before

        # What the guest still does after its boot is its own; a timer of ours would go on.
        assert eventually(lambda: wake_ups() == 0, WAIT)

    def test_a_guest_that_never_answers_is_told_with_its_last_lines(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        empty = tmp_path / "empty.cpio"
        with empty.open("wb") as file:
            write_archive([directory("dev")], file)
        guest = make(kernel=default_store().current().kernel, initramfs=empty)
        with pytest.raises(MachineError) as caught:
            guest.machine.start(START_WAIT)
        text = str(caught.value)
        assert "machine m0: " in text
        assert "Kernel panic" in text
        assert guest.exited.wait(WAIT)

    def test_a_start_ends_at_its_deadline(self, make: MakeGuest) -> None:
        guest = make()
        began = time.monotonic()
        with pytest.raises(MachineError, match=r"m0: the guest did not answer in 0\.\d+ s"):
            guest.machine.start(0.3)
        assert time.monotonic() - began < START_WAIT
        assert guest.exited.wait(WAIT)

    def test_too_little_memory_is_found_before_the_start(self, make: MakeGuest) -> None:
        guest = make(memory_mb=16)
        with pytest.raises(MachineError, match="memory"):
            guest.machine.start(START_WAIT)
        assert guest.leases == []

    def test_an_image_that_is_not_there_is_found_before_the_start(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        guest = make(kernel=tmp_path / "nothing", initramfs=tmp_path / "nothing either")
        with pytest.raises(MachineError, match="nothing"):
            guest.machine.start(START_WAIT)
        assert guest.leases == []

    def test_an_agent_whose_layer_was_not_made_is_refused_with_the_command_that_makes_it(
        self, make: MakeGuest
    ) -> None:
        guest = make(agent="nobody")
        with pytest.raises(MachineError, match=r"agent nobody.*`voidbus image build nobody`"):
            guest.machine.start(START_WAIT)
        assert guest.leases == []

    def test_several_processors_are_seen_by_the_guest(self, make: MakeGuest) -> None:
        channel = make(vcpus=2).start().channel
        assert run(channel, "nproc").stdout == b"2\n"

    def test_a_machine_full_of_mounts_has_them_all(self, make: MakeGuest, tmp_path: Path) -> None:
        # With the vsock and the disk that tells of mounts for which the kernel's line has no room.
        mounts = make_mounts(tmp_path, MAX_DEVICES - 2)
        guest = make(mounts=mounts).start()
        paths = [mount.guest_path for mount in mounts]
        names = run(guest.channel, "cat", *(f"{path}/name" for path in paths)).stdout
        assert names.split() == [str(number).encode() for number in range(len(mounts))]
        assert shell(guest.channel, f"echo x >{paths[1]}/new").result().exit_code == 0
        assert shell(guest.channel, f"echo x >{paths[0]}/new").result().exit_code != 0
        assert b"voidbus.more=vda" in run(guest.channel, "cat", "/proc/cmdline").stdout

    def test_one_mount_too_many_is_refused_before_the_start(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        guest = make(mounts=make_mounts(tmp_path, MAX_DEVICES - 1))
        with pytest.raises(MachineError, match="24 devices, but a machine has room for 23; mount"):
            guest.machine.start(START_WAIT)
        assert guest.leases == []

    def test_a_guest_of_others_is_told_of_mounts_by_its_line_only(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        image = default_store().current()
        mounts = make_mounts(tmp_path, 20)
        guest = make(mounts=mounts, kernel=image.kernel, initramfs=image.initramfs)
        with pytest.raises(MachineError, match=r"line of \d+ bytes is too long; use fewer mounts"):
            guest.machine.start(START_WAIT)
        assert guest.leases == []

    def test_qemu_dies_with_the_host_process(self, tmp_path: Path) -> None:
        program = (
            "import sys,secrets,pathlib,threading\n"
            "from voidbus.vm.qemu.machine import QemuMachine\n"
            "from voidbus.vm.machine import MachineSpec\n"
            "s=MachineSpec('r','m',pathlib.Path(sys.argv[1]),secrets.token_bytes(32))\n"
            "m=QemuMachine(s,on_exit=print,on_lease=lambda l:print(l.pid,flush=True))\n"
            "m.start(90)\n"
            "threading.Event().wait(60)\n"
        )
        host = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        qemu = os.pidfd_open(pid)
        try:
            assert stat_fields(pid)
            host.kill()
            host.wait(WAIT)
            assert select.select([qemu], [], [], WAIT)[0]
        finally:
            os.close(qemu)
            host.stdout.close()

    def test_every_program_the_image_promises_is_there_and_runs(self, shared: Guest) -> None:
        programs = default_store().current().manifest.programs
        assert {"void-message", "void-mcp", "claudio", "python3", "sh"} <= {
            Path(p).name for p in programs
        }
        # 126 and 127 are the shell's words for what can't be run; busybox's own say 1 to --help.
        script = (
            'for program; do "$program" --help </dev/null >/dev/null 2>&1; code=$?;'
            ' [ $code -lt 126 ] || echo "$program: $code"; done'
        )
        result = run(shared.channel, "sh", "-c", script, "sh", *programs, timeout=120)
        assert (result.stdout, result.exit_code) == (b"", 0)
