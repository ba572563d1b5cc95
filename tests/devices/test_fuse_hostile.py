"""A guest that breaks the rules, and a host that changes under it: nothing leads out."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_kit import MODE, MTIME, SIZE, FuseClient, by_hand, client_of, errno_of, open_descriptors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.fuse_messages import ROOT_NODE, Opcode
from voidbus.vm.devices.fuse_server import FuseServer
from voidbus.vm.devices.share_nodes import ShareLimits
from voidbus.vm.devices.shared_directory import MountError, SharedDirectory

ROOT = ROOT_NODE
HUGE = (0, 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    (tmp_path / "secret").write_text("outside")
    return folder


@pytest.fixture
def guest(host: Path) -> Iterator[FuseClient]:
    share = SharedDirectory(host, writable=True)
    yield client_of(share)
    share.close()


# -- names ---------------------------------------------------------------------------------------

BAD_NAMES = [b"", b".", b"..", b"/", b"a/b", b"../secret", b"/etc/passwd", b"x" * 256]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_not_one_name_is_refused_everywhere(
    guest: FuseClient, host: Path, name: bytes
) -> None:
    node = guest.put(ROOT, b"there", b"")
    refused = {"EINVAL", "ENAMETOOLONG"}
    assert errno_of(guest.lookup, ROOT, name) in refused
    assert errno_of(guest.create, ROOT, name) in refused
    assert errno_of(guest.mknod, ROOT, name, stat.S_IFREG) in refused
    assert errno_of(guest.mkdir, ROOT, name) in refused
    assert errno_of(guest.symlink, ROOT, name, b"x") in refused
    assert errno_of(guest.link, node, ROOT, name) in refused
    assert errno_of(guest.unlink, ROOT, name) in refused
    assert errno_of(guest.rmdir, ROOT, name) in refused
    assert errno_of(guest.rename, ROOT, name, ROOT, b"x") in refused
    assert errno_of(guest.rename, ROOT, b"there", ROOT, name) in refused
    assert [path.name for path in host.iterdir()] == ["there"]
    assert sorted(path.name for path in host.parent.iterdir()) == ["secret", "share"]


def test_names_must_end_and_be_as_many_as_needed(guest: FuseClient) -> None:
    for body in (b"", b"unended", b"a\0b\0", b"a\0b"):
        with pytest.raises(OSError, match="Invalid argument"):
            guest.ask(Opcode.LOOKUP, ROOT, body)
    for body in (b"", bytes(7), bytes(8), bytes(8) + b"a\0", bytes(8) + b"a\0b\0c\0"):
        with pytest.raises(OSError, match="Invalid argument"):
            guest.ask(Opcode.RENAME, ROOT, body)


def test_targets_of_links_are_bounded(guest: FuseClient) -> None:
    guest.symlink(ROOT, b"longest", b"x" * 4095)
    assert errno_of(guest.symlink, ROOT, b"longer", b"x" * 4096) == "ENAMETOOLONG"
    assert errno_of(guest.symlink, ROOT, b"none", b"") == "ENOENT"


# -- numbers -------------------------------------------------------------------------------------


def test_nodes_never_given_are_refused(guest: FuseClient) -> None:
    for node in (0, 2, 99, *HUGE[2:]):
        assert errno_of(guest.getattr, node) == "ESTALE"
        assert errno_of(guest.open, node) == "ESTALE"
        assert errno_of(guest.lookup, node, b"a") == "ESTALE"
        assert errno_of(guest.link, node, ROOT, b"a") == "ESTALE"
        guest.forget(node, 1)


def test_handles_never_given_or_of_another_node_are_refused(guest: FuseClient) -> None:
    (one, first), (two, _) = guest.create(ROOT, b"a"), guest.create(ROOT, b"b")
    listing = guest.opendir(ROOT)
    for node, handle in ((one.node, 0), (one.node, 1 << 63), (two.node, first), (ROOT, first)):
        assert errno_of(guest.read, node, handle) == "EBADF"
        assert errno_of(guest.write, node, handle, b"x") == "EBADF"
        assert errno_of(guest.release, node, handle) == "EBADF"
        assert errno_of(guest.fsync, node, handle) == "EBADF"
        assert errno_of(guest.readdir, node, handle) == "EBADF"
    assert errno_of(guest.readdir, one.node, first) == "ENOTDIR"
    assert errno_of(guest.read, ROOT, listing) == "EISDIR"
    guest.release(one.node, first)
    assert errno_of(guest.release, one.node, first) == "EBADF"


def test_a_handle_does_only_what_it_was_opened_for(guest: FuseClient) -> None:
    node = guest.put(ROOT, b"a", b"data")
    reading, writing = guest.open(node, os.O_RDONLY), guest.open(node, os.O_WRONLY)
    assert errno_of(guest.write, node, reading, b"x") == "EBADF"
    assert errno_of(guest.read, node, writing) == "EBADF"
    assert errno_of(guest.fallocate, node, reading, 0, 0, 1) == "EBADF"
    assert errno_of(guest.open, node, os.O_ACCMODE) == "EINVAL"


@pytest.mark.parametrize("offset", HUGE[4:])
def test_offsets_near_the_end_of_numbers_are_refused(guest: FuseClient, offset: int) -> None:
    found, handle = guest.create(ROOT, b"a")
    listing = guest.opendir(ROOT)
    refused = {"EFBIG", "EINVAL", "ENXIO"}
    both = (found.node, handle)
    for call in (
        lambda: guest.read(found.node, handle, offset),
        lambda: guest.write(found.node, handle, b"xx", offset),
        lambda: guest.fallocate(found.node, handle, 0, offset, offset),
        lambda: guest.seek(found.node, handle, offset, os.SEEK_DATA),
        lambda: guest.copy(both, offset, both, offset, offset),
    ):
        assert errno_of(call) in refused
    if offset >= 1 << 63:
        assert errno_of(guest.readdir, ROOT, listing, offset) == "EINVAL"
        assert errno_of(lambda: guest.setattr(found.node, SIZE, size=offset)) in refused
    assert guest.getattr(found.node).size == 0


def test_times_that_are_none_are_refused(guest: FuseClient) -> None:
    node = guest.put(ROOT, b"a", b"")
    for seconds, nanoseconds in ((0, 10**9), (1 << 62, 0), (-(1 << 62), 0), (0, (1 << 32) - 1)):
        with pytest.raises(OSError, match="Invalid argument"):
            guest.setattr(node, MTIME, mtime=seconds, mtime_ns=nanoseconds)


def test_every_request_is_answered_whatever_it_is(guest: FuseClient) -> None:
    """Every operation with bodies cut short, zeros and ones."""
    for opcode in range(1, 60):
        if opcode in (Opcode.INIT, Opcode.DESTROY):
            continue
        for body in (b"", b"\0", bytes(8), bytes(40), bytes(200), b"\xff" * 40, b"\xff" * 200):
            with contextlib.suppress(OSError):
                guest.raw(opcode, ROOT, body)
    guest.getattr(ROOT)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    opcode=st.sampled_from(sorted(set(Opcode) - {Opcode.INIT})),
    node=st.sampled_from((0, 1, 2, 3, 1 << 63)),
    body=st.binary(max_size=120),
    room=st.sampled_from((16, 24, 100, 4096)),
    lie=st.sampled_from((0, 0, 0, -1, 5)),
)
def test_random_requests_never_break_the_device(
    guest: FuseClient, opcode: int, node: int, body: bytes, room: int, lie: int
) -> None:
    header = struct.pack("<IIQQIIII", 40 + len(body) + lie, opcode, 7, node, 0, 0, 0, 0)
    answer = guest.send([header, body], room)
    if answer:
        length, error, unique = struct.unpack_from("<IiQ", answer)
        assert (length, unique) == (len(answer), 7)
        assert -4096 < error <= 0


def test_a_request_without_a_header_or_room_ends_the_device(host: Path) -> None:
    share = SharedDirectory(host, writable=True)
    send = by_hand(FuseServer(share))
    with pytest.raises(DeviceError, match="less than a header"):
        send([bytes(39)], 4096)
    with pytest.raises(DeviceError, match="for its answer"):
        send([struct.pack("<IIQQ16x", 40, Opcode.GETATTR, 1, 1)], 15)
    share.close()


def test_an_answer_that_has_no_room_is_an_error(guest: FuseClient) -> None:
    for room in (16, 17, 16 + 103):
        with pytest.raises(OSError, match="Invalid argument"):
            guest.ask(Opcode.GETATTR, ROOT, bytes(16), room=room)
    listing = guest.opendir(ROOT)
    body = struct.pack("<QQIIQII", listing, 0, 4096, 0, 0, 0, 0)
    assert guest.ask(Opcode.READDIR, ROOT, body, room=16) == b""


def test_a_write_of_more_than_was_sent_is_refused(guest: FuseClient) -> None:
    found, handle = guest.create(ROOT, b"a")
    body = struct.pack("<QQIIQII", handle, 0, 100, 0, 0, 0, 0)
    with pytest.raises(OSError, match="Invalid argument"):
        guest.ask(Opcode.WRITE, found.node, body, data=b"short")
    with pytest.raises(OSError, match="Invalid argument"):
        guest.ask(Opcode.WRITE, found.node, body[:20])


def test_a_guest_that_has_no_session_gets_nothing(host: Path) -> None:
    share = SharedDirectory(host, writable=True)
    guest = FuseClient(by_hand(FuseServer(share)))
    assert errno_of(guest.getattr, ROOT) == "EIO"
    guest.forget(1, 1)
    share.close()


# -- floods --------------------------------------------------------------------------------------


def test_a_flood_of_lookups_and_forgets_is_bounded(host: Path) -> None:
    share = SharedDirectory(host, writable=True, limits=ShareLimits(nodes=64, descriptors=8))
    guest = client_of(share)
    for number in range(300):
        (host / str(number)).touch()
    before = open_descriptors()
    for number in range(300):
        found = guest.lookup(ROOT, str(number).encode())
        guest.forget(found.node, 1 << 63)
        guest.forget(found.node, (1 << 64) - 1)
        guest.lookup(ROOT, str(number).encode())
    guest.forget(ROOT, (1 << 64) - 1)
    assert share.known == 64
    assert open_descriptors() <= before + 9
    guest.getattr(ROOT)
    share.close()


def test_a_directory_forgotten_before_what_is_in_it_goes_with_it(host: Path) -> None:
    share = SharedDirectory(host, writable=True)
    guest = client_of(share)
    nodes = [ROOT]
    for depth in range(50):
        nodes.append(guest.mkdir(nodes[-1], f"{depth}".encode()).node)
    for node in nodes[1:-1]:
        guest.forget(node)
    assert share.known == 50
    assert guest.getattr(nodes[-1]).links == 2
    guest.forget(nodes[-1])
    assert share.known == 0
    share.close()


def test_a_batch_that_says_more_than_it_has_is_dropped(guest: FuseClient) -> None:
    node = guest.put(ROOT, b"a", b"")
    body = struct.pack("<I4x", 1 << 31) + struct.pack("<QQ", node, 1)
    assert guest.raw(Opcode.BATCH_FORGET, 0, body, room=0) is None
    guest.getattr(node)
    guest.batch_forget((node, 1), (node, 1), (77, 1))
    assert errno_of(guest.getattr, node) == "ESTALE"


# -- what is on the host ---------------------------------------------------------------------------


def test_fifos_sockets_and_devices_are_seen_but_never_opened_or_made(
    guest: FuseClient, host: Path
) -> None:
    os.mkfifo(host / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(host / "socket"))
        for name, kind in ((b"fifo", stat.S_IFIFO), (b"socket", stat.S_IFSOCK)):
            found = guest.lookup(ROOT, name)
            assert stat.S_IFMT(found.attributes.mode) == kind
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
                assert errno_of(guest.open, found.node, flags) == "EPERM"
            assert errno_of(guest.create, ROOT, name, os.O_RDWR) == "EPERM"
            assert errno_of(guest.setattr, found.node, SIZE, size=0) == "EPERM"
    for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFDIR):
        assert errno_of(guest.mknod, ROOT, b"new", kind | 0o666, 0x103) == "EPERM"
    assert sorted(path.name for path in host.iterdir()) == ["fifo", "socket"]


def test_a_read_only_share_refuses_every_change(host: Path) -> None:
    (host / "a").write_text("data")
    (host / "d").mkdir()
    share = SharedDirectory(host, writable=False)
    guest = client_of(share)
    node = guest.lookup(ROOT, b"a").node
    assert guest.content(node) == b"data"
    before = (host / "a").stat()
    reading = guest.open(node)
    for call in (
        lambda: guest.open(node, os.O_WRONLY),
        lambda: guest.open(node, os.O_RDWR),
        lambda: guest.open(node, os.O_RDONLY | os.O_TRUNC),
        lambda: guest.create(ROOT, b"b"),
        lambda: guest.create(ROOT, b"a", os.O_RDONLY),
        lambda: guest.mknod(ROOT, b"b", stat.S_IFREG),
        lambda: guest.mkdir(ROOT, b"b"),
        lambda: guest.symlink(ROOT, b"b", b"a"),
        lambda: guest.link(node, ROOT, b"b"),
        lambda: guest.unlink(ROOT, b"a"),
        lambda: guest.rmdir(ROOT, b"d"),
        lambda: guest.rename(ROOT, b"a", ROOT, b"b"),
        lambda: guest.rename(ROOT, b"a", ROOT, b"d", 2),
        lambda: guest.setattr(node, MODE, mode=0o777),
        lambda: guest.setattr(node, SIZE, size=0),
        lambda: guest.setattr(node, MTIME, mtime=1),
        lambda: guest.setattr(node, 0),
        lambda: guest.access(node, os.W_OK),
    ):
        assert errno_of(call) == "EROFS"
    for call in (
        lambda: guest.write(node, reading, b"x"),
        lambda: guest.fallocate(node, reading, 0, 0, 1 << 20),
        lambda: guest.copy((node, reading), 0, (node, reading), 2, 1),
    ):
        assert errno_of(call) == "EBADF"
    after = (host / "a").stat()
    assert (before.st_mtime_ns, before.st_mode) == (after.st_mtime_ns, after.st_mode)
    assert sorted(path.name for path in host.iterdir()) == ["a", "d"]
    share.close()


def test_a_directory_swapped_for_a_link_never_leads_out(host: Path, tmp_path: Path) -> None:
    """The host swaps a directory for a link to one outside, again and again, while the guest
    goes through it, knows it, and makes files in it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"outside")
    (host / "real").mkdir()
    (host / "real/file").write_bytes(b"inside")
    (host / "link").symlink_to(outside)
    (host / "real").rename(host / "place")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            (host / "place").rename(host / "real")
            (host / "link").rename(host / "place")
            (host / "place").rename(host / "link")
            (host / "real").rename(host / "place")

    share = SharedDirectory(host, writable=True, limits=ShareLimits(descriptors=8, handles=64))
    guest = client_of(share)
    swapping = threading.Thread(target=swap)
    swapping.start()
    reached = 0
    try:
        for number in range(400):
            # Other files push the directory's descriptor out, so that it is reached anew.
            for other in range(9):
                guest.put(ROOT, f"other{other}".encode(), b"")
            with contextlib.suppress(OSError):
                directory = guest.lookup(ROOT, b"place").node
                found = guest.lookup(directory, b"file")
                assert guest.content(found.node) == b"inside"
                reached += 1
                guest.put(directory, f"made{number}".encode(), b"x")
                guest.setattr(found.node, SIZE, size=6)
                guest.rename(directory, f"made{number}".encode(), directory, b"made")
    finally:
        stop.set()
        swapping.join()
    assert reached
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_bytes() == b"outside"
    share.close()


def test_a_file_swapped_for_a_link_is_not_followed(guest: FuseClient, host: Path) -> None:
    node = guest.put(ROOT, b"a", b"inside")
    (host / "a").unlink()
    (host / "a").symlink_to(host.parent / "secret")
    for call in (
        lambda: guest.open(node),
        lambda: guest.open(node, os.O_WRONLY),
        lambda: guest.create(ROOT, b"a", os.O_RDWR),
        lambda: guest.setattr(node, SIZE, size=0),
    ):
        assert errno_of(call) in ("ESTALE", "ELOOP")
    with contextlib.suppress(OSError):
        guest.setattr(node, MODE, mode=0o777)
    secret = host.parent / "secret"
    assert secret.read_text() == "outside"
    assert stat.S_IMODE(secret.stat().st_mode) != 0o777


def test_directories_the_host_moves_into_each_other_make_no_circle(host: Path) -> None:
    share = SharedDirectory(host, writable=True, limits=ShareLimits(descriptors=8))
    guest = client_of(share)
    first = guest.mkdir(ROOT, b"a").node
    second = guest.mkdir(first, b"b").node
    guest.opendir(first)
    guest.opendir(second)
    (host / "a/b").rename(host / "b")
    (host / "a").rename(host / "b/a")
    third = guest.lookup(second, b"a").node
    with contextlib.suppress(OSError):
        guest.rename(second, b"a", third, b"c")
    for number in range(30):
        guest.put(ROOT, f"f{number}".encode(), b"")
    for node in (first, second, third):
        with contextlib.suppress(OSError):
            guest.getattr(node)
            guest.mkdir(node, b"x")
    guest.getattr(guest.lookup(ROOT, b"b").node)
    share.close()


# -- owners ----------------------------------------------------------------------------------------


@pytest.mark.needs("root")
def test_under_root_files_belong_to_the_directorys_owner(host: Path) -> None:
    os.chown(host, 12345, 23456)
    share = SharedDirectory(host, writable=True)
    guest = client_of(share)
    made = guest.mkdir(ROOT, b"d")
    guest.put(made.node, b"f", b"x")
    guest.symlink(ROOT, b"l", b"f")
    guest.mknod(ROOT, b"n", stat.S_IFREG | 0o600)
    for name in ("d", "d/f", "l", "n"):
        found = (host / name).lstat()
        assert (found.st_uid, found.st_gid) == (12345, 23456), name
    assert guest.getattr(made.node).uid == 1000
    (host / "after").touch()
    assert (host / "after").stat().st_uid == 0
    share.close()


@pytest.mark.needs("root")
def test_under_root_a_guest_has_the_owners_rights_and_no_more(host: Path) -> None:
    (host / "roots").write_text("private")
    (host / "roots").chmod(0o600)
    (host / "readable").write_text("public")
    (host / "readable").chmod(0o644)
    os.chown(host, 12345, 12345)
    share = SharedDirectory(host, writable=True)
    guest = client_of(share)
    private, public = guest.lookup(ROOT, b"roots"), guest.lookup(ROOT, b"readable")
    assert private.attributes.mode == 0o100000
    assert errno_of(guest.open, private.node) == "EACCES"
    assert errno_of(guest.setattr, private.node, MODE, mode=0o777) == "EPERM"
    assert public.attributes.mode == 0o100444
    assert guest.content(public.node) == b"public"
    assert errno_of(guest.open, public.node, os.O_WRONLY) == "EACCES"
    assert errno_of(guest.access, public.node, os.W_OK) == "EACCES"
    share.close()


@pytest.mark.needs("root")
def test_a_directory_its_owner_may_not_enter_is_refused(host: Path) -> None:
    os.chown(host, 12345, 12345)
    host.chmod(0o077)
    before = open_descriptors()
    with pytest.raises(MountError, match="must be able to read and enter it"):
        SharedDirectory(host, writable=False)
    assert open_descriptors() == before
    host.chmod(0o755)
