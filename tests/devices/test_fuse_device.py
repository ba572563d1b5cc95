"""The file system device behind its queues, as a monitor and a guest's driver use it."""

from __future__ import annotations

import os
import queue
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

import pytest
from fuse_kit import FuseClient, errno_of, open_descriptors
from virtio_driver import WAIT, DriverQueue, GuestRam, VhostUserFrontEnd

from voidbus.vm.devices.fuse_messages import ROOT_NODE, Opcode
from voidbus.vm.devices.vhost_user_fs import MountError, VhostUserFs

ROOT = ROOT_NODE
DATA = 1 << 17


class Mounted(NamedTuple):
    """A share, served, and a guest's two queues to it."""

    host: Path
    share: VhostUserFs
    front_end: VhostUserFrontEnd
    ram: GuestRam
    first: DriverQueue
    requests: DriverQueue
    failures: queue.SimpleQueue[str]

    def guest(self) -> FuseClient:
        client = FuseClient(self.carrier())
        client.init()
        return client

    def carrier(self) -> Callable[[list[bytes], int], bytes]:
        def send(readable: list[bytes], room: int) -> bytes:
            on = self.requests if room else self.first
            pieces = [part for whole in readable for part in split(whole)]
            rooms = [16] + [min(4096, room - at) for at in range(16, room, 4096)] if room else []
            on.add(pieces, rooms)
            on.kick()
            (done,) = on.wait()
            return done.data

        return send


def split(whole: bytes) -> list[bytes]:
    return [whole[at : at + 4096] for at in range(0, len(whole), 4096)]


def opened(host: Path, sockets: Path, stack: ExitStack, *, indirect: bool) -> Mounted:
    failures: queue.SimpleQueue[str] = queue.SimpleQueue()
    share = VhostUserFs(
        sockets / "fs", host, "mount0", writable=True, name="mount0", on_failed=failures.put
    )
    stack.enter_context(closing(share)).start()
    ram = stack.enter_context(closing(GuestRam(1 << 24)))
    queues = [
        stack.enter_context(closing(DriverQueue(ram, 256, event_idx=True, indirect=indirect)))
        for _ in range(2)
    ]
    front_end = stack.enter_context(closing(VhostUserFrontEnd(sockets / "fs")))
    front_end.start(ram, queues)
    first, requests = queues
    return Mounted(host, share, front_end, ram, first, requests, failures)


@pytest.fixture(params=[False, True], ids=["direct", "indirect"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    (tmp_path / "share").mkdir()
    with ExitStack() as stack:
        yield opened(tmp_path / "share", tmp_path, stack, indirect=request.param)


def test_a_guest_works_with_files_through_its_queues(mounted: Mounted) -> None:
    guest = mounted.guest()
    data = os.urandom(DATA)
    node = guest.put(ROOT, b"a", data)
    assert (mounted.host / "a").read_bytes() == data
    handle = guest.open(node)
    assert guest.read(node, handle, 0, DATA) == data
    assert guest.read(node, handle, DATA - 5, 4096) == data[-5:]
    assert guest.names(ROOT) == [b"a"]
    guest.release(node, handle)
    guest.forget(node)
    assert errno_of(guest.getattr, node) == "ESTALE"
    assert mounted.failures.empty()


def test_many_requests_at_a_time_are_all_answered(mounted: Mounted) -> None:
    mounted.guest()
    asked = {}
    for unique in range(60):
        header = struct.pack("<IIQQ16x", 56, Opcode.GETATTR, unique, ROOT)
        asked[mounted.requests.add([header, bytes(16)], [16, 104])] = unique
    mounted.requests.kick()
    while asked:
        for done in mounted.requests.wait():
            length, error, unique = struct.unpack_from("<IiQ", done.data)
            assert (length, error, unique) == (120, 0, asked.pop(done.token))


def test_the_configuration_has_the_tag_and_one_queue(mounted: Mounted) -> None:
    assert mounted.front_end.config(40) == b"mount0".ljust(36, b"\0") + struct.pack("<I", 1)


def test_a_request_without_a_header_ends_the_device_with_a_reason(mounted: Mounted) -> None:
    mounted.requests.add([b"short"], [4096])
    mounted.requests.kick()
    assert "less than a header" in mounted.failures.get(timeout=WAIT)
    assert mounted.failures.empty()


def test_a_guest_that_starts_again_finds_no_old_session(mounted: Mounted) -> None:
    guest = mounted.guest()
    found, handle = guest.create(ROOT, b"a")
    again = mounted.guest()
    assert errno_of(again.read, found.node, handle) == "EBADF"
    assert errno_of(again.getattr, found.node) == "ESTALE"
    assert again.content(again.lookup(ROOT, b"a").node) == b""


def test_a_monitor_that_goes_leaves_the_share_for_the_next(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    with ExitStack() as stack:
        mounted = opened(tmp_path / "share", tmp_path, stack, indirect=False)
        guest = mounted.guest()
        guest.create(ROOT, b"a")
        mounted.front_end.close()
        with closing(VhostUserFrontEnd(tmp_path / "fs")) as front_end:
            # Answered (GET_FEATURES) once the share has let go of the one before, and its rings.
            front_end.ask(1)
            mounted.first.restart()
            mounted.requests.restart()
            front_end.start(mounted.ram, [mounted.first, mounted.requests])
            assert errno_of(guest.getattr, ROOT) == "EIO"
            assert mounted.guest().names(ROOT) == [b"a"]
        assert mounted.failures.empty()


def test_closing_leaves_no_descriptor_thread_or_socket(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    descriptors, threads = open_descriptors(), threading.active_count()
    with ExitStack() as stack:
        mounted = opened(tmp_path / "share", tmp_path, stack, indirect=True)
        guest = mounted.guest()
        for number in range(20):
            guest.create(ROOT, str(number).encode())
        guest.opendir(ROOT)
        mounted.share.close()
        mounted.share.close()
        assert not (tmp_path / "fs").exists()
    assert (open_descriptors(), threading.active_count()) == (descriptors, threads)


def test_one_that_never_started_closes_too(tmp_path: Path) -> None:
    before = open_descriptors()

    def made(tag: str, directory: Path) -> VhostUserFs:
        return VhostUserFs(
            tmp_path / "fs", directory, tag, writable=False, name="m", on_failed=lambda _: None
        )

    share = made("mount0", tmp_path)
    share.close()
    share.close()
    for tag in ("", "x" * 37, "a\0b"):
        with pytest.raises(ValueError, match="no tag"):
            made(tag, tmp_path)
    with pytest.raises(MountError):
        made("mount0", tmp_path / "missing")
    share = VhostUserFs(
        tmp_path / "no/such/fs", tmp_path, "m", writable=False, name="m", on_failed=print
    )
    with pytest.raises(OSError, match="No such file"):
        share.start()
    share.close()
    assert open_descriptors() == before
