"""What a guest can do with a shared directory, request by request."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuse_kit import (
    ATIME,
    ATIME_NOW,
    FH,
    GID,
    MODE,
    MTIME,
    MTIME_NOW,
    SIZE,
    UID,
    FuseClient,
    client_of,
    dirents,
    errno_of,
    open_descriptors,
)

from voidbus.vm.devices.fuse_messages import ROOT_NODE, Opcode
from voidbus.vm.devices.fuse_server import MAX_WRITE
from voidbus.vm.devices.share_nodes import ShareLimits
from voidbus.vm.devices.shared_directory import MountError, SharedDirectory

ROOT = ROOT_NODE


@pytest.fixture
def host(tmp_path: Path) -> Path:
    folder = tmp_path / "share"
    folder.mkdir()
    return folder


@pytest.fixture
def share(host: Path) -> Iterator[SharedDirectory]:
    shared = SharedDirectory(host, writable=True)
    yield shared
    shared.close()


@pytest.fixture
def guest(share: SharedDirectory) -> FuseClient:
    return client_of(share)


# -- the session -------------------------------------------------------------------------------


def test_a_kernel_too_old_for_virtio_fs_is_refused(guest: FuseClient) -> None:
    assert errno_of(guest.init, minor=30) == "EPROTO"
    assert errno_of(guest.init, major=6, minor=99) == "EPROTO"


def test_a_newer_major_version_is_told_ours_and_asks_again(guest: FuseClient) -> None:
    assert guest.init(major=8, minor=0)[0] == 7
    assert errno_of(guest.getattr, ROOT) == "EIO"
    assert guest.init()[0] == 7
    guest.getattr(ROOT)


def test_only_flags_the_guest_offers_are_taken(guest: FuseClient) -> None:
    answer = guest.init(flags=1 << 5)
    assert answer[3] == 1 << 5
    assert answer[6] == MAX_WRITE
    assert answer[8] == MAX_WRITE // 4096


def test_after_destroy_nothing_is_open_or_known(guest: FuseClient, share: SharedDirectory) -> None:
    found, _ = guest.create(ROOT, b"a")
    guest.ask(Opcode.DESTROY, 0)
    assert (share.known, len(share.files)) == (0, 0)
    guest.init()
    assert errno_of(guest.getattr, found.node) == "ESTALE"


def test_what_is_not_served_is_said_not_to_be_there(guest: FuseClient) -> None:
    # SETXATTR, GETXATTR, FLUSH, GETLK, SETLK, IOCTL, POLL, SYNCFS, TMPFILE, and numbers that are
    # none.
    for opcode in (21, 22, 25, 31, 32, 39, 40, 50, 51, 0, 7, 4096, 0xFFFFFFFF):
        with pytest.raises(OSError, match="not implemented"):
            guest.raw(opcode, ROOT)


# -- files -------------------------------------------------------------------------------------


def test_what_a_guest_writes_is_on_the_host_at_once(guest: FuseClient, host: Path) -> None:
    found, handle = guest.create(ROOT, b"note", mode=0o640)
    assert guest.write(found.node, handle, b"hello", 3) == 5
    assert (host / "note").read_bytes() == b"\0\0\0hello"
    assert stat.S_IMODE((host / "note").stat().st_mode) == 0o640
    assert guest.read(found.node, handle, 3) == b"hello"
    assert guest.read(found.node, handle, 100) == b""
    guest.fsync(found.node, handle)
    guest.fsync(found.node, handle, 1)
    guest.release(found.node, handle)


def test_what_the_host_writes_a_guest_reads(guest: FuseClient, host: Path) -> None:
    (host / "sub").mkdir()
    (host / "sub/note").write_bytes(b"from the host")
    found = guest.walk("sub/note")
    assert found.attributes.size == 13
    assert (found.attributes.uid, found.attributes.gid) == (1000, 1000)
    assert guest.content(found.node) == b"from the host"


def test_a_megabyte_goes_in_one_request(guest: FuseClient, host: Path) -> None:
    data = os.urandom(MAX_WRITE)
    found, handle = guest.create(ROOT, b"big")
    assert guest.write(found.node, handle, data) == MAX_WRITE
    assert (host / "big").read_bytes() == data
    assert guest.read(found.node, handle, 0, MAX_WRITE) == data
    assert errno_of(guest.read, found.node, handle, 0, MAX_WRITE + 1) == "EINVAL"
    assert errno_of(guest.write, found.node, handle, bytes(MAX_WRITE + 1)) == "EINVAL"


def test_an_existing_file_is_created_only_without_o_excl(guest: FuseClient, host: Path) -> None:
    (host / "a").write_bytes(b"there")
    assert errno_of(guest.create, ROOT, b"a", os.O_RDWR | os.O_EXCL) == "EEXIST"
    found, handle = guest.create(ROOT, b"a", os.O_RDWR)
    assert guest.read(found.node, handle) == b"there"
    found, handle = guest.create(ROOT, b"a", os.O_RDWR | os.O_TRUNC)
    assert guest.read(found.node, handle) == b""
    guest.write(found.node, handle, b"again")
    assert guest.read(found.node, guest.open(found.node, os.O_RDONLY | os.O_TRUNC)) == b""


def test_appending_never_overwrites_what_the_host_appended(guest: FuseClient, host: Path) -> None:
    found, handle = guest.create(ROOT, b"log", os.O_WRONLY | os.O_APPEND)
    guest.write(found.node, handle, b"one", 0)
    with (host / "log").open("ab") as log:
        log.write(b"two")
    guest.write(found.node, handle, b"three", 3)
    assert (host / "log").read_bytes() == b"onetwothree"


def test_an_open_file_goes_on_after_it_is_unlinked(guest: FuseClient, host: Path) -> None:
    found, handle = guest.create(ROOT, b"gone")
    guest.unlink(ROOT, b"gone")
    guest.write(found.node, handle, b"still")
    assert guest.getattr(found.node).size == 5
    assert guest.getattr(found.node).links == 0
    guest.setattr(found.node, SIZE, size=2)
    assert guest.read(found.node, handle) == b"st"
    guest.release(found.node, handle)
    assert not list(host.iterdir())


def test_a_new_file_with_an_old_inode_number_has_a_node_of_its_own(guest: FuseClient) -> None:
    first = guest.put(ROOT, b"a", b"1")
    guest.unlink(ROOT, b"a")
    guest.forget(first, 0)
    assert guest.put(ROOT, b"b", b"2") != first


def test_holes_are_found_and_made(guest: FuseClient) -> None:
    found, handle = guest.create(ROOT, b"sparse")
    guest.write(found.node, handle, b"x" * 4096, 1 << 20)
    assert guest.seek(found.node, handle, 0, os.SEEK_DATA) == 1 << 20
    assert guest.seek(found.node, handle, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 4096
    assert errno_of(guest.seek, found.node, handle, 0, os.SEEK_SET) == "EINVAL"
    guest.fallocate(found.node, handle, 0, 2 << 20, 4096)
    assert guest.getattr(found.node).size == (2 << 20) + 4096
    guest.fallocate(found.node, handle, 3, 1 << 20, 4096)
    assert guest.read(found.node, handle, 1 << 20, 4096) == bytes(4096)
    assert errno_of(guest.fallocate, found.node, handle, 8, 0, 4096) == "ENOTSUP"


def test_the_host_copies_between_files(guest: FuseClient, host: Path) -> None:
    first = guest.put(ROOT, b"a", b"0123456789")
    source = guest.open(first)
    target, handle = guest.create(ROOT, b"b")
    assert guest.copy((first, source), 2, (target.node, handle), 1, 5) == 5
    assert (host / "b").read_bytes() == b"\x0023456"
    backwards = ((target.node, handle), 0, (first, source), 0, 1)
    assert errno_of(guest.copy, *backwards) == "EBADF"


# -- attributes --------------------------------------------------------------------------------


def test_size_mode_and_times_are_set(guest: FuseClient, host: Path) -> None:
    node = guest.put(ROOT, b"a", b"0123456789")
    assert guest.setattr(node, SIZE, size=4).size == 4
    assert guest.setattr(node, MODE, mode=0o100600).mode == 0o100600
    changed = guest.setattr(node, ATIME | MTIME, atime=-5, atime_ns=7, mtime=11, mtime_ns=13)
    assert (changed.atime, changed.mtime) == (-5 * 10**9 + 7, 11 * 10**9 + 13)
    assert (host / "a").stat().st_mtime_ns == 11 * 10**9 + 13
    later = guest.setattr(node, MTIME | MTIME_NOW)
    assert later.atime == changed.atime
    assert later.mtime > 10**18
    both = guest.setattr(node, ATIME | ATIME_NOW | MTIME | MTIME_NOW)
    assert both.atime > 10**18


def test_a_file_without_write_permission_is_truncated_by_its_handle(guest: FuseClient) -> None:
    found, handle = guest.create(ROOT, b"a", os.O_WRONLY, 0o444)
    guest.write(found.node, handle, b"abc")
    assert guest.setattr(found.node, SIZE | FH, size=1, handle=handle).size == 1


def test_the_owner_stays_what_it_is(guest: FuseClient, host: Path) -> None:
    node = guest.put(ROOT, b"a", b"")
    before = (host / "a").stat()
    assert guest.setattr(node, UID | GID, uid=1000, gid=1000).uid == 1000
    assert errno_of(guest.setattr, node, UID, uid=0) == "EPERM"
    assert errno_of(guest.setattr, node, GID, gid=0) == "EPERM"
    after = (host / "a").stat()
    assert (before.st_uid, before.st_gid) == (after.st_uid, after.st_gid)


def test_no_set_uid_program_is_left_on_the_host(guest: FuseClient, host: Path) -> None:
    found, _ = guest.create(ROOT, b"a", mode=0o6755)
    assert stat.S_IMODE((host / "a").stat().st_mode) == 0o755
    guest.setattr(found.node, MODE, mode=0o107777)
    assert stat.S_IMODE((host / "a").stat().st_mode) == 0o777
    guest.mknod(ROOT, b"b", stat.S_IFREG | 0o4711)
    assert stat.S_IMODE((host / "b").stat().st_mode) == 0o711
    guest.mkdir(ROOT, b"d", 0o7777)
    assert stat.S_IMODE((host / "d").stat().st_mode) == 0o777


def test_writing_takes_the_set_uid_bit_of_a_file_of_the_host(guest: FuseClient, host: Path) -> None:
    for name in ("opened", "truncated"):
        path = host / name
        path.write_bytes(b"#!/bin/true")
        path.chmod(0o6755)
        found = guest.lookup(ROOT, name.encode())
        assert found.attributes.mode == 0o100755
        guest.release(found.node, guest.open(found.node))
        assert stat.S_IMODE(path.stat().st_mode) == 0o6755
        if name == "opened":
            guest.open(found.node, os.O_WRONLY)
        else:
            guest.setattr(found.node, SIZE, size=0)
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_directory_keeps_the_set_gid_bit_the_host_gave_it(guest: FuseClient, host: Path) -> None:
    (host / "team").mkdir()
    (host / "team").chmod(0o2775)
    found = guest.lookup(ROOT, b"team")
    assert found.attributes.mode == 0o40775
    guest.setattr(found.node, MODE, mode=0o755)
    assert stat.S_IMODE((host / "team").stat().st_mode) == 0o2755


def test_our_umask_is_not_the_guests(guest: FuseClient, host: Path) -> None:
    before = os.umask(0o077)
    try:
        guest.create(ROOT, b"a", mode=0o666)
        guest.mkdir(ROOT, b"d", 0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE((host / "a").stat().st_mode) == 0o666
    assert stat.S_IMODE((host / "d").stat().st_mode) == 0o777


# -- names -------------------------------------------------------------------------------------


def test_directories_are_made_listed_and_removed(guest: FuseClient, host: Path) -> None:
    made = guest.mkdir(ROOT, b"d")
    guest.put(made.node, b"inside", b"")
    assert guest.names(ROOT) == [b"d"]
    assert guest.names(made.node) == [b"inside"]
    assert errno_of(guest.rmdir, ROOT, b"d") == "ENOTEMPTY"
    assert errno_of(guest.unlink, ROOT, b"d") in ("EISDIR", "EPERM")
    guest.unlink(made.node, b"inside")
    guest.rmdir(ROOT, b"d")
    assert not list(host.iterdir())


def test_a_large_directory_is_listed_in_parts_and_from_any_place(
    guest: FuseClient, host: Path
) -> None:
    wanted = {f"file-{number:04}".encode() for number in range(1500)}
    for name in wanted:
        (host / name.decode()).touch()
    assert sorted(guest.names(ROOT, size=512)) == sorted(wanted)
    handle = guest.opendir(ROOT)
    first = dirents(guest.readdir(ROOT, handle, 0, 4096))
    rest = dirents(guest.readdir(ROOT, handle, first[-1][1], 4096))
    assert dirents(guest.readdir(ROOT, handle, first[-1][1], 4096)) == rest
    assert dirents(guest.readdir(ROOT, handle, 0, 4096)) == first
    assert dirents(guest.readdir(ROOT, handle, first[3][1], 256))[0] == first[4]
    guest.fsync(ROOT, handle, opcode=Opcode.FSYNCDIR)
    guest.releasedir(ROOT, handle)


def test_listing_with_entries_looks_up_each_but_dot_and_dot_dot(
    guest: FuseClient, host: Path, share: SharedDirectory
) -> None:
    for number in range(50):
        (host / f"f{number}").write_bytes(b"x" * number)
    handle = guest.opendir(ROOT)
    seen: dict[bytes, int] = {}
    offset = 0
    while listed := dirents(guest.readdirplus(ROOT, handle, offset), plus=True):
        seen |= {name: node for node, _, name in listed}
        offset = listed[-1][1]
    assert (seen.pop(b"."), seen.pop(b"..")) == (0, 0)
    assert len(seen) == share.known == 50
    assert guest.getattr(seen[b"f7"]).size == 7
    guest.batch_forget(*((node, 1) for node in seen.values()))
    assert share.known == 0


def test_what_is_above_the_share_is_not_told_of(guest: FuseClient, host: Path) -> None:
    listed = {name: inode for inode, _, name in dirents(guest.readdir(ROOT, guest.opendir(ROOT)))}
    assert listed[b".."] == listed[b"."] == host.stat().st_ino


def test_files_and_directories_are_renamed_and_stay_known(guest: FuseClient, host: Path) -> None:
    first = guest.mkdir(ROOT, b"one")
    inner = guest.put(first.node, b"inner", b"data")
    guest.rename(ROOT, b"one", ROOT, b"two")
    assert guest.content(inner) == b"data"
    second = guest.mkdir(ROOT, b"three")
    guest.rename(first.node, b"inner", second.node, b"moved", 0)
    assert guest.content(inner) == b"data"
    assert (host / "three/moved").read_bytes() == b"data"
    assert guest.lookup(second.node, b"moved").node == inner


def test_rename_replaces_refuses_or_exchanges(guest: FuseClient, host: Path) -> None:
    a, b = guest.put(ROOT, b"a", b"A"), guest.put(ROOT, b"b", b"B")
    assert errno_of(guest.rename, ROOT, b"a", ROOT, b"b", 1) == "EEXIST"
    assert errno_of(guest.rename, ROOT, b"a", ROOT, b"b", 4) == "EINVAL"
    guest.rename(ROOT, b"a", ROOT, b"b", 2)
    assert ((host / "a").read_bytes(), (host / "b").read_bytes()) == (b"B", b"A")
    assert (guest.content(a), guest.content(b)) == (b"A", b"B")
    guest.rename(ROOT, b"a", ROOT, b"b")
    assert (host / "b").read_bytes() == b"B"
    assert errno_of(guest.rename, ROOT, b"a", ROOT, b"c") == "ENOENT"


def test_a_file_may_have_several_names(guest: FuseClient, host: Path) -> None:
    node = guest.put(ROOT, b"a", b"data")
    made = guest.link(node, ROOT, b"b")
    assert made.node == node
    assert made.attributes.links == 2
    assert (host / "a").samefile(host / "b")
    guest.rename(ROOT, b"a", ROOT, b"b")  # does nothing: they are one file
    assert guest.content(guest.lookup(ROOT, b"a").node) == b"data"
    guest.unlink(ROOT, b"a")
    assert guest.content(guest.lookup(ROOT, b"b").node) == b"data"
    folder = guest.mkdir(ROOT, b"d")
    assert errno_of(guest.link, folder.node, ROOT, b"e") == "EPERM"


def test_a_link_is_told_of_and_never_followed(guest: FuseClient, host: Path) -> None:
    (host / "out").symlink_to("/etc/passwd")
    found = guest.lookup(ROOT, b"out")
    assert stat.S_ISLNK(found.attributes.mode)
    assert guest.readlink(found.node) == b"/etc/passwd"
    assert errno_of(guest.open, found.node) == "ELOOP"
    assert errno_of(guest.lookup, found.node, b"x") == "ENOTDIR"
    assert errno_of(guest.opendir, found.node) in ("ENOTDIR", "ELOOP")
    assert errno_of(guest.setattr, found.node, MODE, mode=0o777) == "ENOTSUP"
    assert errno_of(guest.setattr, found.node, SIZE, size=0) == "ELOOP"
    assert errno_of(guest.link, found.node, ROOT, b"copy") == "EPERM"
    before = Path("/etc/passwd").stat().st_mtime_ns
    guest.setattr(found.node, MTIME, mtime=1)
    assert Path("/etc/passwd").stat().st_mtime_ns == before
    made = guest.symlink(ROOT, b"new", b"../../anywhere")
    assert guest.readlink(made.node) == b"../../anywhere"
    assert (host / "new").readlink() == Path("../../anywhere")
    assert errno_of(guest.create, ROOT, b"out", os.O_RDWR) == "ELOOP"
    assert errno_of(guest.readlink, ROOT) == "EINVAL"


def test_what_the_host_changes_is_seen(guest: FuseClient, host: Path) -> None:
    node = guest.put(ROOT, b"a", b"first")
    (host / "new").write_bytes(b"second version")
    (host / "new").rename(host / "a")
    assert errno_of(guest.getattr, node) == "ESTALE"
    found = guest.lookup(ROOT, b"a")
    assert found.attributes.size == 14
    assert guest.content(found.node) == b"second version"
    (host / "a").unlink()
    assert errno_of(guest.lookup, ROOT, b"a") == "ENOENT"


def test_access_is_the_hosts_word(guest: FuseClient, host: Path) -> None:
    node = guest.put(ROOT, b"a", b"")
    guest.access(node, os.R_OK | os.W_OK)
    (host / "a").chmod(0o600)
    assert errno_of(guest.access, node, os.X_OK) == "EACCES"


def test_the_file_systems_size_is_told(guest: FuseClient, host: Path) -> None:
    answer = guest.ask(Opcode.STATFS, ROOT)
    assert len(answer) == 80
    assert struct.unpack_from("<Q", answer)[0] == os.statvfs(host).f_blocks


# -- bounds ------------------------------------------------------------------------------------


def test_one_open_file_too_many_is_refused(host: Path) -> None:
    share = SharedDirectory(host, writable=True, limits=ShareLimits(handles=3))
    guest = client_of(share)
    node = guest.put(ROOT, b"a", b"")
    handles = [guest.open(node) for _ in range(3)]
    assert errno_of(guest.open, node) == "ENFILE"
    assert errno_of(guest.opendir, ROOT) == "ENFILE"
    assert errno_of(guest.create, ROOT, b"never") == "ENFILE"
    assert not (host / "never").exists()
    guest.release(node, handles[0])
    guest.open(node)
    share.close()


def test_deep_trees_are_served_with_few_descriptors(host: Path) -> None:
    share = SharedDirectory(host, writable=True, limits=ShareLimits(descriptors=8))
    guest = client_of(share)
    node, nodes = ROOT, [ROOT]
    for depth in range(60):
        node = guest.mkdir(node, f"d{depth}".encode()).node
        nodes.append(node)
    files = [guest.put(folder, b"f", str(number).encode()) for number, folder in enumerate(nodes)]
    before = open_descriptors()
    for number, file in enumerate(files):
        assert guest.content(file) == str(number).encode()
    assert open_descriptors() <= before + 8
    guest.rename(nodes[30], b"d30", ROOT, b"elsewhere")
    assert guest.content(files[60]) == b"60"
    share.close()


def test_past_the_limit_the_file_unused_for_longest_is_forgotten(host: Path) -> None:
    share = SharedDirectory(host, writable=True, limits=ShareLimits(nodes=10))
    guest = client_of(share)
    nodes = [guest.put(ROOT, f"f{number}".encode(), b"x") for number in range(30)]
    assert share.known == 10
    assert errno_of(guest.getattr, nodes[0]) == "ESTALE"
    guest.getattr(nodes[-1])
    again = guest.lookup(ROOT, b"f0")
    assert guest.content(again.node) == b"x"
    guest.forget(nodes[0])
    share.close()


def test_when_nothing_can_be_forgotten_a_lookup_fails(host: Path) -> None:
    share = SharedDirectory(host, writable=True, limits=ShareLimits(nodes=3))
    guest = client_of(share)
    node = ROOT
    for name in (b"a", b"b", b"c"):
        found, _ = guest.create(node, b"open-" + name)
    assert errno_of(guest.mkdir, ROOT, b"d") == "ENFILE"
    guest.getattr(found.node)
    share.close()


# -- what can't be shared ----------------------------------------------------------------------


def test_a_directory_that_is_not_there_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MountError, match=r"no such directory.*mkdir -p"):
        SharedDirectory(tmp_path / "missing", writable=False)
    (tmp_path / "file").touch()
    with pytest.raises(MountError, match="not a directory"):
        SharedDirectory(tmp_path / "file", writable=False)


def test_closing_leaves_no_descriptor_open(host: Path) -> None:
    before = open_descriptors()
    share = SharedDirectory(host, writable=True)
    guest = client_of(share)
    for number in range(100):
        guest.mkdir(ROOT, f"d{number}".encode())
        guest.create(ROOT, f"f{number}".encode())
    guest.opendir(ROOT)
    share.close()
    share.close()
    assert open_descriptors() == before
