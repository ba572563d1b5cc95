"""Directories of the host that virtiofsd serves to a machine of ours: the real program, behind a
machine's registers, and a guest that is the test's own."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_kit import FuseClient, errno_of
from mmio_driver import MmioDriver
from virtio_driver import WAIT, DriverQueue, GuestRam, guest_ram
from virtiofsd import OWNER, owned_directory, virtiofsd

from voidbus.vm.devices.shared_directory import MountError
from voidbus.vm.devices.virtio_fs import configuration
from voidbus.vm.helper_process import readable
from voidbus.vm.machine import Mount
from voidbus.vm.virtiofsd import Virtiofsd, VirtiofsdDevice

SIZE = 64


def owner_of(mount: Mount) -> tuple[int, int]:
    status = mount.host_path.stat()
    return status.st_uid, status.st_gid


class Shared:
    """A guest that has begun its session with a share."""

    def __init__(
        self, mount: Mount, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
    ) -> None:
        program = virtiofsd()
        assert program is not None
        self.virtiofsd = Virtiofsd(program, mount, owner_of(mount), folder, "mount0")
        stack.callback(self.virtiofsd.close)
        memory = ram.memory()
        stack.callback(memory.close)
        self.device = VirtiofsdDevice(self.virtiofsd, "mount0", memory, ram.shared, patience=WAIT)
        self.driver = MmioDriver(self.device, ram)
        stack.callback(self.driver.close)
        self._ram = ram
        self._stack = stack
        self._requests: DriverQueue
        self.client = FuseClient(self._send)
        self.start()

    def start(self) -> None:
        """Start the driver and the session, or start them again."""
        queues = [DriverQueue(self._ram, SIZE) for _ in range(2)]
        for queue in queues:
            self._stack.callback(queue.close)
        self._requests = queues[1]
        self.driver.start(queues)
        assert self.client.init()[0] == 7

    def _send(self, pieces: list[bytes], room: int) -> bytes:
        self._requests.add([piece for piece in pieces if piece], [room] if room else [])
        self._requests.kick()
        (done,) = self._requests.wait()
        return done.data

    @property
    def processes(self) -> list[int]:
        """virtiofsd, which waits for the one in its namespaces, and that one."""
        pid = self.virtiofsd.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *map(int, children)]


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with guest_ram() as made:
        yield made


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def host() -> Iterator[Path]:
    with owned_directory() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "machine"
    made.mkdir(mode=0o700)
    return made


def share(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack, *, writable: bool = True
) -> Shared:
    return Shared(Mount(host, "/mnt", writable=writable), folder, ram, stack)


def status_of(pid: int) -> dict[str, str]:
    """proc_pid_status(5)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def runs(pid: int) -> bool:
    """Whether it is there, and not only to be waited for by init."""
    try:
        return status_of(pid)["State"][0] != "Z"
    except OSError:
        return False


def put(path: Path, text: str) -> None:
    """A file of the shared directory's owner."""
    path.write_text(text)
    owner = path.parent.stat()
    os.chown(path, owner.st_uid, owner.st_gid)


needs_virtiofsd = pytest.mark.needs("virtiofsd")


@needs_virtiofsd
def test_a_guest_reads_and_writes_the_directory(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    put(host / "from-host", "hello")
    client = share(host, folder, ram, stack).client
    assert client.content(client.walk("from-host").node) == b"hello"
    client.put(1, b"from-guest", b"answer")
    made = (host / "from-guest").stat()
    assert (host / "from-guest").read_bytes() == b"answer"
    assert (made.st_uid, made.st_gid) == (host.stat().st_uid, host.stat().st_gid)
    client.mkdir(1, b"folder")
    assert set(client.names(1)) >= {b"folder", b"from-guest", b"from-host"}


@needs_virtiofsd
def test_in_the_guest_all_files_are_the_agents(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    put(host / "f", "x")
    client = share(host, folder, ram, stack).client
    for found in (client.getattr(1), client.walk("f").attributes):
        assert (found.uid, found.gid) == (1000, 1000)


@needs_virtiofsd
def test_a_read_only_directory_stays_as_it_is(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    put(host / "f", "as it was")
    client = share(host, folder, ram, stack, writable=False).client
    node = client.walk("f").node
    assert client.content(node) == b"as it was"
    assert errno_of(client.put, 1, b"new", b"x") == "EROFS"
    assert errno_of(client.mkdir, 1, b"d") == "EROFS"
    assert errno_of(client.open, node, os.O_RDWR) == "EROFS"
    assert errno_of(client.unlink, 1, b"f") == "EROFS"
    assert (host / "f").read_text() == "as it was"
    assert [path.name for path in host.iterdir()] == ["f"]


@needs_virtiofsd
@pytest.mark.needs("root")
def test_a_guest_has_the_rights_of_the_directorys_owner_and_not_roots(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    (host / "roots").write_text("secret")
    (host / "roots").chmod(0o600)
    client = share(host, folder, ram, stack).client
    node = client.walk("roots").node
    assert errno_of(client.open, node) == "EACCES"
    assert errno_of(client.mknod, 1, b"null", stat.S_IFCHR | 0o666, 0x103) == "EPERM"


@needs_virtiofsd
@pytest.mark.needs("root")
def test_a_directory_of_root_is_served_without_roots_capabilities(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    os.chown(host, 0, 0)
    put(host / "anothers", "secret")
    os.chown(host / "anothers", OWNER, OWNER)
    (host / "anothers").chmod(0o600)
    put(host / "own", "x")
    shared = share(host, folder, ram, stack, writable=False)
    client = shared.client
    assert client.content(client.walk("own").node) == b"x"
    assert errno_of(client.open, client.walk("anothers").node) == "EACCES"
    outer, serving = map(status_of, shared.processes)
    assert outer["CapEff"] == outer["CapBnd"] == serving["CapBnd"] == "0" * 16


@needs_virtiofsd
def test_links_lead_nowhere_on_the_host(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    (host / "link").symlink_to("/etc/passwd")
    client = share(host, folder, ram, stack).client
    node = client.walk("link").node
    assert client.readlink(node) == b"/etc/passwd"
    assert errno_of(client.open, node) != ""
    assert errno_of(client.lookup, 1, b"../machine") != ""


@needs_virtiofsd
def test_it_is_in_namespaces_of_its_own_and_holds_nothing_of_ours(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    secret = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, secret)
    os.set_inheritable(secret, True)
    shared = share(host, folder, ram, stack)
    outer, serving = shared.processes
    for kind in ("user", "mnt", "pid", "net"):
        theirs, ours = (Path(f"/proc/{who}/ns/{kind}").readlink() for who in (serving, "self"))
        assert theirs != ours, kind
    for status in map(status_of, shared.processes):
        assert status["NoNewPrivs"] == "1"
        assert status["Uid"].split()[0] == str(host.stat().st_uid)
        if os.geteuid() == 0:
            assert status["Groups"].split() == []
    assert status_of(serving)["Seccomp"] == "2"
    assert status_of(outer)["CapEff"] == "0" * 16
    held = {path.readlink() for path in Path(f"/proc/{serving}/fd").iterdir()}
    assert folder not in held
    assert list(folder.iterdir()) == [], "the socket's path is gone"


@needs_virtiofsd
def test_it_ends_with_the_machine(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    shared = share(host, folder, ram, stack)
    processes = shared.processes
    assert len(processes) == 2
    shared.driver.close()
    shared.virtiofsd.close()
    assert not any(map(runs, processes))
    assert not shared.driver.failures


@needs_virtiofsd
def test_its_end_is_the_machines_with_the_reason(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    shared = share(host, folder, ram, stack)
    os.kill(shared.processes[-1], signal.SIGKILL)
    reason = shared.driver.failure()
    assert reason.startswith("vhost-user: the back end has gone")
    assert f"(virtiofsd, which served {host}: exit code" in reason
    assert "terminated by signal 9" in reason


@needs_virtiofsd
def test_a_driver_that_resets_may_begin_another_session(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    put(host / "f", "x")
    shared = share(host, folder, ram, stack)
    shared.driver.write(0x70, 0)
    shared.driver.settled()
    shared.start()
    assert shared.client.content(shared.client.walk("f").node) == b"x"
    assert not shared.driver.failures


@needs_virtiofsd
def test_the_end_waits_for_no_virtiofsd_that_is_stopped(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    shared = share(host, folder, ram, stack)
    processes = shared.processes
    os.kill(processes[-1], signal.SIGSTOP)
    shared.device.hang_up()
    shared.driver.close()
    assert not shared.driver.failures
    shared.virtiofsd.close()
    assert not any(map(runs, processes))


# -- what can't be shared -----------------------------------------------------------------


def failing(folder: Path, text: str) -> Path:
    program = folder / "program"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return program


def refusal(program: Path, mount: Mount, folder: Path, ram: GuestRam) -> str:
    def start() -> None:
        with contextlib.closing(ram.memory()) as memory:
            started = Virtiofsd(program, mount, owner_of(mount), folder, "mount0")
            with contextlib.closing(started):
                VirtiofsdDevice(started, "mount0", memory, ram.shared, patience=WAIT)

    with pytest.raises(MountError) as caught:
        start()
    return str(caught.value)


@needs_virtiofsd
def test_a_program_that_is_missing_is_named(
    host: Path, folder: Path, ram: GuestRam, tmp_path: Path
) -> None:
    said = refusal(tmp_path / "nowhere", Mount(host, "/mnt"), folder, ram)
    assert said.startswith(f"{host} can't be shared: ")
    assert f"{tmp_path}/nowhere" in said
    assert "or leave machines.virtiofsd unset" in said


@needs_virtiofsd
def test_a_program_that_refuses_our_options_is_told_with_its_words(
    host: Path, folder: Path, ram: GuestRam
) -> None:
    program = failing(host.parent, "echo 'unknown option --translate-uid' >&2; exit 2")
    said = refusal(program, Mount(host, "/mnt"), folder, ram)
    assert "exit code 2; unknown option --translate-uid" in said
    assert "It takes virtiofsd 1.13 or later" in said


def test_a_host_without_the_programs_that_seal_it_is_told_which(
    host: Path, folder: Path, ram: GuestRam, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "defpath", str(folder))
    monkeypatch.setenv("PATH", str(folder))
    said = refusal(Path("/bin/true"), Mount(host, "/mnt"), folder, ram)
    assert "'setpriv'" in said
    assert "It takes setpriv and unshare (of util-linux)" in said


def test_a_socket_path_that_is_too_long_is_told(host: Path, ram: GuestRam, tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    assert "is too long" in refusal(Path("/bin/true"), Mount(host, "/mnt"), folder, ram)


def test_the_configuration_is_the_one_of_our_own_device() -> None:
    assert configuration("mount0") == b"mount0".ljust(36, b"\0") + b"\1\0\0\0"


@needs_virtiofsd
def test_what_a_program_has_started_ends_with_it_whatever_it_ignores(
    host: Path, folder: Path
) -> None:
    script = "trap '' TERM; (trap '' TERM; echo up >&2; while :; do sleep 1; done) & wait"
    mount = Mount(host, "/mnt")
    started = Virtiofsd(failing(host.parent, script), mount, owner_of(mount), folder, "mount0")
    assert readable(started.process.stderr, WAIT)
    children = [lease.pid for lease in started.process.children() if lease.pid is not None]
    processes = [started.process.pid, *children]
    assert len(processes) == 2
    started.socket.close()
    assert started.ending().endswith("was killed by SIGKILL; up")
    assert not any(map(runs, processes))


@needs_virtiofsd
def test_a_guest_may_know_as_many_files_as_a_process_may_have_open(
    host: Path, folder: Path, ram: GuestRam, stack: contextlib.ExitStack
) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    shared = share(host, folder, ram, stack)
    limits = Path(f"/proc/{shared.processes[-1]}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max open files"))
    assert int(line.split()[3]) == (65536 if hard == resource.RLIM_INFINITY else min(65536, hard))
