"""Machines on `/dev/kvm`, with the stock kernel and image, where the processor can run them."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
from guest_vm import eventually
from machine_kit import (
    START_WAIT,
    WAIT,
    Guest,
    MachineConformance,
    MachineFixtures,
    MakeGuest,
    living,
    run,
    shell,
)
from mount_kit import MountConformance
from virtiofsd import owned_directory, virtiofsd
from watch_kit import FileWatchConformance

from voidbus.vm.image.cpio import directory, write_archive
from voidbus.vm.image.store import default_store
from voidbus.vm.kvm.guest_devices import MAX_DEVICES
from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.machine import MachineError, Mount

pytestmark = [pytest.mark.needs("kvm-hardware", "image"), pytest.mark.timeout(600)]


def make_mounts(folder: Path, count: int) -> tuple[Mount, ...]:
    """Directories with a file each, and long paths in the guest; every other one is writable."""
    mounts = []
    for number in range(count):
        given = folder / f"given{number}"
        given.mkdir()
        (given / "name").write_text(f"{number}\n")
        guest_path = f"/data/{'a-rather-long-name-for-a-directory' * 4}/of-the-guest/{number}"
        mounts.append(Mount(given, guest_path, writable=number % 2 == 1))
    return tuple(mounts)


def switches_of(thread: int) -> int:
    """How often a thread of this process has waited for something (proc_pid_status(5))."""
    text = Path(f"/proc/self/task/{thread}/status").read_text()
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


class TestKvmMachine(MachineConformance, FileWatchConformance, MountConformance):
    machine_type = KvmMachine

    def test_it_says_that_it_isolates(self) -> None:
        assert (KvmMachine.name, KvmMachine.isolation) == ("kvm", "vm")

    def test_programs_run_as_a_user_without_privileges(self, shared: Guest) -> None:
        assert run(shared.channel, "id", "-u").stdout == b"1000\n"

    def test_a_guest_of_two_processors_boots_with_few_exits_and_the_clock_of_kvm(
        self, make: MakeGuest
    ) -> None:
        guest = make(vcpus=2).start()
        assert isinstance(guest.machine, KvmMachine)
        assert sum(guest.machine.exits.values()) < 2000
        assert list(guest.machine.boot_marks) == ["kernel", "init", "agent"]
        source = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
        said = shell(guest.channel, f"nproc; cat {source}").result().stdout
        assert said == b"2\nkvm-clock\n"

    def test_an_idle_machine_wakes_no_thread_of_its_devices(self, make: MakeGuest) -> None:
        before = set(threading.enumerate())
        make().start()
        ours = [
            thread.native_id
            for thread in set(threading.enumerate()) - before
            if "-vcpu" not in thread.name  # those run the guest, which is not idle at once
        ]
        assert ours

        def wake_ups() -> int:
            count = sum(switches_of(thread) for thread in ours if thread)
            threading.Event().wait(1.0)
            return sum(switches_of(thread) for thread in ours if thread) - count

        # What the guest still does after its boot is its own; a timer of ours would go on.
        assert eventually(lambda: wake_ups() == 0, WAIT)

    def test_an_idle_guest_sleeps(self, make: MakeGuest) -> None:
        before = set(threading.enumerate())
        make().start()
        (vcpu,) = (each for each in set(threading.enumerate()) - before if "-vcpu" in each.name)
        assert vcpu.native_id is not None

        def wake_ups() -> int:
            count = switches_of(vcpu.native_id or 0)
            threading.Event().wait(2.0)
            return switches_of(vcpu.native_id or 0) - count

        # A stock kernel left to itself wakes 15 times in that.
        assert eventually(lambda: wake_ups() <= 4, WAIT)

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
        assert "machine m0: the guest has ended: reset by a triple fault" in text
        assert "Kernel panic" in text
        assert guest.exited.wait(WAIT)

    def test_a_start_ends_at_its_deadline(self, make: MakeGuest) -> None:
        guest = make()
        began = time.monotonic()
        with pytest.raises(MachineError, match=r"m0: the guest did not answer in 0(\.\d+)? s"):
            guest.machine.start(0.3)
        assert time.monotonic() - began < START_WAIT
        assert guest.exited.wait(WAIT)

    def test_a_machine_full_of_mounts_has_them_all(self, make: MakeGuest, tmp_path: Path) -> None:
        # With vsock, entropy, and the disk that tells of mounts for which the line has no room.
        mounts = make_mounts(tmp_path, MAX_DEVICES - 3)
        guest = make(mounts=mounts).start()
        paths = [mount.guest_path for mount in mounts]
        names = run(guest.channel, "cat", *(f"{path}/name" for path in paths)).stdout
        assert names.split() == [str(number).encode() for number in range(len(mounts))]
        assert shell(guest.channel, f"echo x >{paths[1]}/new").result().exit_code == 0
        assert shell(guest.channel, f"echo x >{paths[0]}/new").result().exit_code != 0
        assert b"voidbus.more=vda" in run(guest.channel, "cat", "/proc/cmdline").stdout


@pytest.mark.needs("virtiofsd")
class TestKvmMachineWithVirtiofsd(MountConformance):
    machine_type = KvmMachine
    fields: ClassVar[dict[str, object]] = {"virtiofsd": virtiofsd()}

    def test_memory_that_held_the_kernels_files_is_good_for_a_file_of_the_host(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        # Memory of the guest that is not the memory file's would be read by nobody else. A guest
        # that keeps a large file in memory has it everywhere.
        host = tmp_path / "shared"
        host.mkdir()
        digest = hashlib.sha256()
        with (host / "large").open("wb") as file:
            for _ in range(140):
                piece = os.urandom(1 << 20)
                digest.update(piece)
                file.write(piece)
        channel = make(memory_mb=256, mounts=(Mount(host, "/data"),)).start().channel
        for _ in range(2):  # from the host, and then from memory
            said = run(channel, "sha256sum", "/data/large", timeout=240).stdout
            assert said.split()[0].decode() == digest.hexdigest()

    def test_a_guest_writes_as_the_directorys_owner(self, make: MakeGuest) -> None:
        with owned_directory() as host:
            before = living()
            guest = make(mounts=(Mount(host, "/workspace/data", writable=True),)).start()
            assert len(living() - before) == 2
            script = "cd /workspace/data; mkdir d; echo x >d/f; stat -c '%u %a' . d/f"
            said = shell(guest.channel, script).result()
            assert said.stdout == b"1000 755\n1000 644\n"
            guest.channel.write_file("/workspace/data/d/g", b"by request", WAIT)
            assert (host / "d/g").read_bytes() == b"by request"
            assert (host / "d/f").stat().st_uid == (host / "d/g").stat().st_uid
            assert (host / "d/f").stat().st_uid == host.stat().st_uid
            guest.machine.close()

    @pytest.mark.needs("root")
    def test_a_writable_directory_of_roots_is_left_to_our_own_device(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        before = living()
        guest = make(mounts=(Mount(tmp_path, "/data", writable=True),)).start()
        assert living() == before
        script = "echo x >/data/f; chmod u+s /data/f; ls /data/f"
        assert shell(guest.channel, script).result().exit_code == 0
        assert not (tmp_path / "f").stat().st_mode & stat.S_ISUID

    def test_nothing_of_it_outlives_the_machine(self, make: MakeGuest, tmp_path: Path) -> None:
        before = living()
        guest = make(mounts=(Mount(tmp_path, "/data"), Mount(tmp_path, "/more"))).start()
        assert len(living() - before) == 4, "two for each"
        guest.machine.close()
        assert living() == before

    def test_its_end_ends_the_machine_with_the_reason(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        before = living()
        guest = make(mounts=(Mount(tmp_path, "/data"),)).start()
        for pid in living() - before:
            os.kill(pid, signal.SIGKILL)
        assert guest.exited.wait(WAIT)
        (ended,) = guest.exits
        assert f"virtiofsd, which served {tmp_path}: " in ended.reason


class TestKvmMachineWithoutVirtiofsd(MachineFixtures):
    machine_type = KvmMachine

    def test_one_that_is_not_there_fails_the_start_with_its_name(
        self, make: MakeGuest, tmp_path: Path
    ) -> None:
        guest = make(virtiofsd=tmp_path / "nowhere", mounts=(Mount(tmp_path, "/data"),))
        with pytest.raises(MachineError, match=r"can't be shared: .*nowhere"):
            guest.machine.start(WAIT)


@pytest.mark.needs("vhost-vsock")
class TestKvmMachineWithTheKernelsVsock(MachineConformance):
    machine_type = KvmMachine
    fields: ClassVar[dict[str, object]] = {"kernel_vsock": True}

    def test_two_machines_have_addresses_of_their_own(self, make: MakeGuest) -> None:
        first, second = make().start(), make().start()
        for guest in (first, second):
            name = guest.machine.spec.name
            assert run(guest.channel, "echo", name).stdout == f"{name}\n".encode()
