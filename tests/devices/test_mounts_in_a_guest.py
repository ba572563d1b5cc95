"""Directories of the host as a real guest's programs use them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from guest_vm import GuestVm

from voidbus.vm.channel import ExecCall, ExecResult, GuestChannel
from voidbus.vm.configure import GuestSettings, configure_guest
from voidbus.vm.devices.vhost_user_fs import VhostUserFs
from voidbus.vm.faults import ChannelFault

pytestmark = [pytest.mark.needs("vm"), pytest.mark.timeout(240)]

BIG = 64 * 1024 * 1024


class Guest(NamedTuple):
    """A running guest with two writable shares and a read-only one."""

    channel: GuestChannel
    work: Path
    other: Path
    fixed: Path
    failures: list[str]


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    base = tmp_path_factory.mktemp("shares")
    sockets = tmp_path_factory.mktemp("s")
    shares = [("work", "rw"), ("other", "rw"), ("fixed", "ro")]
    failures: list[str] = []
    arguments: list[str] = []
    options: list[str] = []
    with ExitStack() as stack:
        for number, (name, mode) in enumerate(shares):
            (base / name).mkdir()
            (base / name / "from-host").write_text(f"hello from {name}")
            (base / name / "passwd").symlink_to("/etc/passwd")
            tag = f"mount{number}"
            path = sockets / tag
            share = VhostUserFs(
                path,
                base / name,
                tag,
                writable=mode == "rw",
                name=tag,
                on_failed=failures.append,
            )
            stack.enter_context(closing(share)).start()
            arguments.append(f"voidbox.{tag}={tag}:/mnt/{name}:{mode}")
            options += ["-chardev", f"socket,id={tag},path={path}"]
            device = f"vhost-user-fs-device,chardev={tag},tag={tag},queue-size=1024"
            options += ["-device", device]
        vm = stack.enter_context(GuestVm(arguments, options=options))
        channel = vm.channel()
        assert configure_guest(channel, GuestSettings(), 30) == ()
        yield Guest(channel, base / "work", base / "other", base / "fixed", failures)


def run(guest: Guest, program: str, *arguments: str) -> Any:
    """Run a Python program in the guest; the JSON it prints."""
    output: list[bytes] = []
    done = threading.Event()
    results: list[ExecResult | ChannelFault] = []

    def on_done(result: ExecResult | ChannelFault) -> None:
        results.append(result)
        done.set()

    call = ExecCall("python3", ("-c", program, *arguments), timeout=120)
    guest.channel.exec(call, lambda _, data: output.append(data), on_done)
    assert done.wait(130)
    said = b"".join(output).decode(errors="replace")
    (result,) = results
    assert isinstance(result, ExecResult), result
    assert result.exit_code == 0, (result, said, guest.failures)
    return json.loads(said)


def test_every_share_is_mounted_with_its_own_content(guest: Guest) -> None:
    said = run(
        guest,
        """
import json, os, sys
print(json.dumps({
    name: [open(f"/mnt/{name}/from-host").read(), os.stat(f"/mnt/{name}").st_uid]
    for name in ("work", "other", "fixed")
}))
""",
    )
    assert said == {name: [f"hello from {name}", 1000] for name in ("work", "other", "fixed")}


def test_files_are_made_changed_renamed_and_removed(guest: Guest) -> None:
    said = run(
        guest,
        """
import json, os, shutil, stat
os.chdir("/mnt/work")
os.makedirs("a/b/c")
with open("a/b/c/file", "w") as file:
    file.write("one")
with open("a/b/c/file", "a") as file:
    file.write("two")
os.rename("a/b/c/file", "a/moved")
os.chmod("a/moved", 0o600)
os.utime("a/moved", (1, 2))
os.symlink("moved", "a/link")
os.link("a/moved", "a/second")
os.truncate("a/second", 5)
found = os.stat("a/moved")
shutil.rmtree("a/b")
open("gone", "w").close()
os.unlink("gone")
print(json.dumps({
    "read": open("a/link").read(),
    "mode": stat.S_IMODE(found.st_mode),
    "owner": [found.st_uid, found.st_gid, os.getuid()],
    "links": found.st_nlink,
    "names": sorted(os.listdir("a")),
}))
""",
    )
    assert said == {
        "read": "onetw",
        "mode": 0o600,
        "owner": [1000, 1000, 1000],
        "links": 2,
        "names": ["link", "moved", "second"],
    }
    moved = guest.work / "a/moved"
    assert moved.read_text() == "onetw"
    assert stat.S_IMODE(moved.stat().st_mode) == 0o600
    assert moved.stat().st_uid == os.geteuid()
    assert not (guest.work / "gone").exists()


def test_a_large_file_arrives_whole_both_ways(guest: Guest) -> None:
    data = os.urandom(1 << 20) * (BIG >> 20)
    (guest.work / "big").write_bytes(data)
    said = run(
        guest,
        """
import hashlib, json, shutil
shutil.copyfile("/mnt/work/big", "/mnt/other/copy")
digest = hashlib.sha256(open("/mnt/work/big", "rb").read()).hexdigest()
with open("/mnt/work/big", "rb") as source, open("/mnt/other/written", "wb") as target:
    while part := source.read(1 << 20):
        target.write(part)
print(json.dumps(digest))
""",
    )
    digest = hashlib.sha256(data).hexdigest()
    assert said == digest
    for name in ("copy", "written"):
        assert hashlib.sha256((guest.other / name).read_bytes()).hexdigest() == digest
        (guest.other / name).unlink()
    (guest.work / "big").unlink()


def test_a_read_only_share_refuses_every_change(guest: Guest) -> None:
    said = run(
        guest,
        """
import errno, json, os
def refusal(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
os.chdir("/mnt/fixed")
print(json.dumps([
    refusal(open, "new", "w"),
    refusal(open, "from-host", "a"),
    refusal(os.mkdir, "d"),
    refusal(os.unlink, "from-host"),
    refusal(os.rename, "from-host", "x"),
    refusal(os.chmod, "from-host", 0o777),
    refusal(os.truncate, "from-host", 0),
    refusal(os.symlink, "a", "b"),
]))
""",
    )
    assert said == ["EROFS"] * 8
    assert sorted(path.name for path in guest.fixed.iterdir()) == ["from-host", "passwd"]


def test_links_and_dot_dot_lead_into_the_guests_own_world(guest: Guest) -> None:
    said = run(
        guest,
        """
import json, os
print(json.dumps([
    open("/mnt/work/passwd").read() == open("/etc/passwd").read(),
    "sandbox" in open("/mnt/work/passwd").read(),
    sorted(os.listdir("/mnt/work/..")),
]))
""",
    )
    assert said == [True, True, ["fixed", "other", "work"]]
    assert "sandbox" not in Path("/etc/passwd").read_text()


def test_what_the_host_changes_the_guest_sees_in_a_moment(guest: Guest) -> None:
    (guest.work / "changing").write_text("first")
    program = """
import json, os, time
path = "/mnt/work/changing"
seen = [open(path).read()]
open("/mnt/work/ready", "w").close()
deadline = time.monotonic() + 60
while time.monotonic() < deadline and open(path).read() != "second version":
    time.sleep(0.1)
seen.append(open(path).read())
print(json.dumps([seen, os.path.exists("/mnt/work/new-from-host")]))
"""
    stop = threading.Event()

    def change() -> None:
        while not (guest.work / "ready").exists() and not stop.wait(0.05):
            pass
        (guest.work / "new-from-host").touch()
        (guest.work / "changing").write_text("second version")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert run(guest, program) == [["first", "second version"], True]
    finally:
        stop.set()
        thread.join(10)


def test_many_small_files_are_made_and_listed(guest: Guest) -> None:
    said = run(
        guest,
        """
import json, os
os.mkdir("/mnt/work/many")
for number in range(1000):
    with open(f"/mnt/work/many/{number}", "w") as file:
        file.write(str(number))
found = sorted(int(entry.name) for entry in os.scandir("/mnt/work/many"))
sizes = sum(entry.stat().st_size for entry in os.scandir("/mnt/work/many"))
print(json.dumps([found == list(range(1000)), sizes]))
""",
    )
    assert said == [True, 10 + 90 * 2 + 900 * 3]
    assert len(list((guest.work / "many").iterdir())) == 1000


def test_mappings_locks_appends_and_what_is_not_there(guest: Guest) -> None:
    said = run(
        guest,
        """
import errno, fcntl, json, mmap, os, socket
def refusal(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
os.chdir("/mnt/work")
with open("mapped", "wb+") as file:
    file.truncate(8192)
    with mmap.mmap(file.fileno(), 8192) as mapped:
        mapped[4096:4101] = b"hello"
        mapped.flush()
    fcntl.flock(file, fcntl.LOCK_EX)
    fcntl.lockf(file, fcntl.LOCK_EX)
    os.posix_fallocate(file.fileno(), 0, 16384)
    os.fsync(file.fileno())
for word in ("one", "two"):
    with open("log", "a") as file:
        file.write(word)
unlinked = open("unlinked", "w+")
os.unlink("unlinked")
unlinked.write("still there")
unlinked.seek(0)
print(json.dumps([
    unlinked.read(),
    os.fstat(unlinked.fileno()).st_nlink,
    refusal(os.mkfifo, "fifo"),
    refusal(socket.socket(socket.AF_UNIX).bind, "socket"),
    refusal(os.setxattr, "log", "user.a", b"b"),
    refusal(os.open, ".", os.O_TMPFILE | os.O_RDWR),
    refusal(os.chown, "log", 0, 0),
]))
""",
    )
    assert said == ["still there", 0, "EPERM", "EPERM", "ENOTSUP", "ENOTSUP", "EPERM"]
    mapped = (guest.work / "mapped").read_bytes()
    assert (len(mapped), mapped[4096:4101]) == (16384, b"hello")
    assert (guest.work / "log").read_text() == "onetwo"


def test_no_share_has_failed(guest: Guest) -> None:
    assert guest.failures == []
