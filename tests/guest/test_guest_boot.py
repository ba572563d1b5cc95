"""Real boots: a stock kernel in QEMU with this agent as its first process."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_vm import GuestVm, eventually
from machine_kit import WAIT, Running, run, shell
from watch_kit import ends, watch

from voidbus.vm.channel import ExecCall, GuestChannel
from voidbus.vm.configure import GuestSettings, configure_guest
from voidbus.vm.devices.vhost_user_fs import VhostUserFs
from voidbus.vm.guest.handshake import Flags
from voidbus.vm.guest.limits import Limits
from voidbus.vm.image.store import default_store
from voidbus.vm.pty import PtyCall

pytestmark = [pytest.mark.needs("vm"), pytest.mark.timeout(180)]

CLOCK = 2_000_000_000
"""The time the machine is told on its command line: in 2033."""


@pytest.fixture(scope="module")
def vm() -> Iterator[GuestVm]:
    """One machine for the tests that only look."""
    arguments = ("voidbus.hostname=box", f"voidbox.clock={CLOCK}", "voidbox.mount0=away:/data:rw")
    with GuestVm(arguments) as machine:
        yield machine


@pytest.fixture(scope="module")
def warnings(vm: GuestVm) -> tuple[str, ...]:
    return configure_guest(vm.channel(), GuestSettings(env=(("A", "b"),)), WAIT)


@pytest.fixture(scope="module")
def channel(vm: GuestVm, warnings: tuple[str, ...]) -> GuestChannel:
    return vm.channel()


def out(channel: GuestChannel, script: str) -> str:
    result = shell(channel, script).result()
    assert result.error is None, result
    return (result.stdout + result.stderr).decode().strip()


# -- users and limits ---------------------------------------------------------------------


def test_programs_run_as_the_sandbox_user_without_other_groups(channel: GuestChannel) -> None:
    assert out(channel, "id -u; id -g; id -G").split() == ["1000", "1000", "1000"]


def test_no_program_gains_privileges(channel: GuestChannel) -> None:
    status = out(channel, "cat /proc/self/status")
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    assert "CapPrm:\t0000000000000000" in status


def test_programs_are_held_to_the_protocols_limits(channel: GuestChannel) -> None:
    limits = out(channel, "cat /proc/self/limits")
    lines = {line[:26].strip(): line[26:].split()[:2] for line in limits.splitlines()}
    assert lines["Max open files"] == ["1024", "1024"]
    assert lines["Max processes"] == ["512", "512"]
    assert lines["Max file size"] == ["104857600", "104857600"]


def test_a_file_larger_than_allowed_is_not_written(channel: GuestChannel) -> None:
    script = "dd if=/dev/zero of=/tmp/big bs=1M count=101 2>&1; stat -c %s /tmp/big; rm /tmp/big"
    assert "104857600" in out(channel, script)


def terminal(channel: GuestChannel, script: str, *, interactive: bool) -> str:
    seen: list[bytes] = []
    ended = threading.Event()
    call = PtyCall("sh", ("-c", script), interactive=interactive)
    channel.open_pty(call, seen.append, lambda _: ended.set(), WAIT)
    assert ended.wait(WAIT)
    return b"".join(seen).decode()


def test_a_terminal_is_the_sandbox_users_and_interactive_without_a_file_limit(
    channel: GuestChannel,
) -> None:
    script = "id -u; tty; echo by name >$(tty); ulimit -f"
    assert terminal(channel, script, interactive=True).split() == [
        *("1000", "/dev/pts/0", "by", "name", "unlimited")
    ]
    assert terminal(channel, "ulimit -f", interactive=False).split() == ["204800"]


def test_a_program_that_takes_all_memory_ends_alone(channel: GuestChannel) -> None:
    script = "taken = []\nwhile True: taken.append(bytearray(1 << 20))"
    assert run(channel, "python3", "-c", script, timeout=60).exit_code != 0
    assert out(channel, "echo alive") == "alive"


# -- what is hidden -----------------------------------------------------------------------


def test_the_secret_is_nowhere_a_program_can_look(vm: GuestVm, channel: GuestChannel) -> None:
    secret = vm.secret.hex()
    script = (
        "cat /proc/cmdline /proc/1/cmdline /proc/1/environ /dev/kmsg /run/cmdline; dmesg;"
        " umount /proc/cmdline; cat /proc/cmdline; cat /proc/bootconfig"
    )
    shown = out(channel, script)
    assert "console=ttyS0" in shown
    assert secret not in shown
    assert "dmesg: klogctl: Operation not permitted" in shown
    assert "can't open '/dev/kmsg': Permission denied" in shown
    # The line is bound over, and nothing below /proc or /sys has it either.
    found = out(channel, f"grep -rIl {secret} /run /tmp /etc /sys/module /sys/firmware 2>/dev/null")
    assert found == ""


def test_the_agent_can_be_neither_traced_nor_signalled_nor_read(channel: GuestChannel) -> None:
    script = (
        "kill -9 1; cat /proc/1/mem; ls /proc/1/fd; ls -l /proc/1/root;"
        " cat /proc/kcore /dev/mem /dev/vsock | head -c 1; echo 1 >/proc/sysrq-trigger"
    )
    shown = out(channel, script)
    assert shown.lower().count("denied") + shown.lower().count("not permitted") >= 7, shown


def test_a_program_does_not_reach_the_agents_port(channel: GuestChannel) -> None:
    program = (
        "import socket\n"
        "for cid in (1, 2, 3, 0xffffffff):\n"
        "    s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)\n"
        "    s.settimeout(5)\n"
        "    try:\n"
        "        s.connect((cid, 1234)); print(cid, 'connected')\n"
        "    except OSError as error:\n"
        "        print(cid, 'refused')\n"
    )
    channel.write_file("/workspace/reach.py", program.encode(), WAIT)
    assert "connected" not in run(channel, "python3", "reach.py").stdout.decode()


# -- the machine --------------------------------------------------------------------------


def test_what_went_wrong_at_boot_is_told_and_on_the_console(
    vm: GuestVm, warnings: tuple[str, ...]
) -> None:
    assert len(warnings) == 1
    assert warnings[0].startswith("mount of /data (away): virtiofs: ")
    assert f"guest-agent: {warnings[0]}" in vm.console()


def test_the_machine_has_its_name_and_the_hosts_time(channel: GuestChannel) -> None:
    name, seconds = out(channel, "uname -n; date +%s").split()
    assert name == "box"
    # The clock of the command line, which CONFIGURE set right since.
    assert abs(int(seconds) - time.time()) < 600


def test_the_loopback_is_up_and_there_is_no_card_without_a_network(channel: GuestChannel) -> None:
    assert out(channel, "ls /sys/class/net; cat /sys/class/net/lo/flags").split() == ["lo", "0x9"]


def test_orphans_are_reaped(channel: GuestChannel) -> None:
    out(channel, "(sh -c 'sleep 0.1 & sleep 0.1 &' &) ; sleep 0.3")
    assert eventually(
        lambda: "Z" not in out(channel, "cat /proc/[0-9]*/stat | cut -d' ' -f3"), WAIT
    )


def test_the_places_programs_write_to_are_theirs(channel: GuestChannel) -> None:
    script = (
        "pwd; touch /workspace/a /home/sandbox/b /tmp/c /dev/shm/d && echo written;"
        " readlink /home/sandbox/.local/bin/claude; touch /etc/x /usr/x /x"
    )
    lines = out(channel, script).splitlines()
    assert lines[:3] == ["/workspace", "written", "/usr/local/bin/claude-code"]
    assert sum("ermission denied" in line for line in lines) == 3


# -- the end ------------------------------------------------------------------------------


def test_a_shutdown_ends_stubborn_programs_and_the_machine() -> None:
    with GuestVm() as machine:
        channel = machine.channel()
        settings = GuestSettings(limits=Limits(64, 300, 1_000_000))
        warnings = configure_guest(channel, settings, WAIT)
        assert warnings == ("limit of 64 open files: 1024 is in force",)
        assert out(channel, "ulimit -n; ulimit -u; ulimit -f").split() == ["1024", "300", "1953"]
        running = shell(channel, "trap '' TERM; echo up; while :; do sleep 60; done")
        running.wait_for(b"up")
        assert channel.shutdown(WAIT)
        assert machine.wait(WAIT) == 0


def test_a_host_of_the_base_protocol_is_served_by_its_files() -> None:
    with GuestVm((f"voidbox.clock={CLOCK}",)) as machine:
        channel = machine.channel(Flags.MULTIPLEX)
        settings = GuestSettings(
            env=(("A", "b"),), allowed=("sh",), limits=Limits(2000, 300, 1_000_000)
        )
        assert configure_guest(channel, settings, WAIT) == ()
        assert run(channel, "cat").error == "Command 'cat' is not in the allowed commands list"
        assert out(channel, "echo $A; ulimit -n; ulimit -u").split() == ["b", "2000", "300"]
        # Nothing but the command line has set the clock here.
        assert CLOCK <= int(out(channel, "date +%s")) < CLOCK + 600


def test_a_machine_without_a_secret_answers_nobody() -> None:
    with GuestVm(secret_argument=False) as machine:
        told = "voidbox.secret is not on the command line"
        assert eventually(lambda: told in machine.console(), 60)
        connection = machine.vsock.connect(1234)
        with connection:
            connection.settimeout(WAIT)
            connection.sendall(b"\x25\0\0\0\x03" + bytes(32) + b"\x02\0\0\0\x01")
            with contextlib.suppress(ConnectionError):
                assert connection.recv(100) == b""


# -- roots --------------------------------------------------------------------------------


def squashfs(folder: Path, files: dict[str, bytes]) -> Path:
    tree = folder / f"tree{len(list(folder.iterdir()))}"
    for path, content in files.items():
        target = tree / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(0o755)
    disk = tree.with_suffix(".squashfs")
    command = ["mksquashfs", str(tree), str(disk), "-quiet", "-no-progress", "-all-root"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return disk


def static_busybox() -> bytes:
    """The guest's own: it stands in the tree its image was made of."""
    return (default_store().current().kernel.parent / "root/usr/bin/busybox").read_bytes()


@pytest.mark.needs("squashfs")
def test_layers_lie_over_the_base_the_last_one_on_top(tmp_path: Path) -> None:
    low = squashfs(tmp_path, {"opt/tool/a": b"low", "opt/tool/b": b"low"})
    high = squashfs(tmp_path, {"opt/tool/b": b"high"})
    with GuestVm(("voidbus.layers=vda,vdb",), disks=(low, high)) as machine:
        channel = machine.channel()
        assert configure_guest(channel, GuestSettings(), WAIT) == ()
        assert out(channel, "cat /opt/tool/a; echo; cat /opt/tool/b").split() == ["low", "high"]
        assert out(channel, "python3 -c 'print(1)'; ls /run/voidbus").startswith("1\n")
        # Everything is still hidden, and can be written where it could be.
        assert machine.secret.hex() not in out(channel, "cat /proc/cmdline")
        channel.write_file("/workspace/x", b"x", WAIT)


@pytest.mark.needs("squashfs")
def test_an_image_without_a_c_library_has_its_root_and_our_tools(tmp_path: Path) -> None:
    busybox = static_busybox()
    names = ("sh", "cat", "id", "ls", "which", "tty")
    files = {f"bin/{name}": busybox for name in names} | {"etc/passwd": b"root:x:0:0::/:/bin/sh"}
    disk = squashfs(tmp_path, files)
    with GuestVm(("voidbox.oci_rootfs_dev=/dev/vda",), disks=(disk,)) as machine:
        channel = machine.channel()
        assert configure_guest(channel, GuestSettings(), WAIT) == ()
        assert out(channel, "id -un") == "sandbox"
        assert "No such file" in out(channel, "ls /usr/bin")
        assert "VOID_SIDECAR_URL not set" in out(channel, "void-message health")
        assert "VOID_SIDECAR_URL not set" in out(channel, "void-mcp")
        claudio = run(channel, "claudio", "-p", "hi", "--output-format", "stream-json", "--verbose")
        assert b'"type": "result"' in claudio.stdout
        assert terminal(channel, "id -u", interactive=True).split() == ["1000"]
        assert "Read-only" in out(channel, "cat </dev/null >/opt/voidbus/x")
        assert channel.file_stat("/opt/voidbus/usr/bin/python3.11", WAIT).exists
        told = watch(channel, "/workspace/in/out")
        channel.mkdir("/workspace/in", WAIT)
        for folder in ("/workspace", "/workspace/in"):
            call = ExecCall("sh", ("-c", "echo $PWD >/workspace/in/out"), working_dir=folder)
            ends(Running(channel, call))
            told.wait_for_last(len(folder) + 1)


@pytest.mark.needs("squashfs")
def test_links_of_an_image_lead_nothing_elsewhere(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "data").symlink_to("/etc")
    (tree / "workspace").symlink_to("/etc")
    disk = squashfs(tmp_path, {"etc/x": b""})
    subprocess.run(
        ["mksquashfs", str(tree), str(disk), "-quiet", "-no-progress", "-all-root"],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=60,
    )
    arguments = ("voidbox.oci_rootfs_dev=/dev/vda", "voidbox.mount0=mount0:/data/in:ro")
    with GuestVm(arguments, disks=(disk,)) as machine:
        warnings = configure_guest(machine.channel(), GuestSettings(), WAIT)
        assert any("mount of /data/in" in text and "link" in text for text in warnings), warnings
        assert any("directory /workspace" in text for text in warnings), warnings


def test_without_the_root_that_was_asked_for_nothing_runs() -> None:
    with GuestVm(("voidbox.oci_rootfs_dev=/dev/vda",)) as machine:
        channel = machine.channel()
        warnings = configure_guest(channel, GuestSettings(), WAIT)
        assert warnings == ("there is no block device /dev/vda",)
        refused = run(channel, "echo")
        assert refused.error == "nothing may run here: there is no block device /dev/vda"


# -- directories of the host --------------------------------------------------------------


@contextlib.contextmanager
def sharing(vm: GuestVm, *shares: tuple[str, Path, bool]) -> Iterator[GuestVm]:
    """A machine that has these directories: tag, where, and whether it may write there."""
    with contextlib.ExitStack() as stack:
        for tag, folder, writable in shares:
            device = VhostUserFs(
                vm.folder / tag,
                folder,
                tag,
                writable=writable,
                name=tag,
                on_failed=vm.failures.append,
            )
            stack.callback(device.close)
            device.start()
            vm.add_share(tag)
        yield stack.enter_context(vm)


def test_a_directory_of_the_host_is_read_or_written_as_it_says(tmp_path: Path) -> None:
    given, taken = tmp_path / "given", tmp_path / "taken"
    given.mkdir()
    taken.mkdir()
    (given / "in.txt").write_text("from the host")
    arguments = ("voidbox.mount0=mount0:/data/in:ro", "voidbox.mount1=mount1:/workspace/out:rw")
    shares = (("mount0", given, False), ("mount1", taken, True))
    with sharing(GuestVm(arguments), *shares) as machine:
        channel = machine.channel()
        assert configure_guest(channel, GuestSettings(), WAIT) == ()
        assert out(channel, "cat /data/in/in.txt") == "from the host"
        assert "Read-only" in out(channel, "echo x >/data/in/x")
        assert out(channel, "echo hi >/workspace/out/x; ls -A /workspace/out") == "x"
        channel.shutdown(WAIT)
        assert machine.wait(WAIT) == 0
    assert (taken / "x").read_text() == "hi\n"


def test_a_shared_directory_can_be_the_root(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    busybox = static_busybox()
    for name in ("sh", "cat", "id", "touch"):
        (tmp_path / "bin" / name).write_bytes(busybox)
        (tmp_path / "bin" / name).chmod(0o755)
    arguments = ("voidbox.oci_rootfs=/mnt/rootfs", "voidbox.mount0=mount0:/mnt/rootfs:ro")
    with sharing(GuestVm(arguments), ("mount0", tmp_path, False)) as machine:
        channel = machine.channel()
        assert configure_guest(channel, GuestSettings(), WAIT) == ()
        assert out(channel, "id -u; touch /workspace/x; cat /etc/passwd").startswith(
            "1000\nsandbox:"
        )
    assert not (tmp_path / "workspace").exists()
