"""The guest's file watch alone, and the host's side of it against guests that lie or can't."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_kit import WAIT, open_files
from raw_peer import MakeChannel, RawPeer, raw_guest, raw_guests
from watch_kit import Told

from voidbus.vm.channel import GuestChannel
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest import inotify
from voidbus.vm.guest.file_messages import (
    MAX_WATCHED,
    FileStat,
    decode_path,
    encode_file_stat,
)
from voidbus.vm.guest.file_watch import MAX_NAMES, FileWatcher
from voidbus.vm.guest.frames import MessageType
from voidbus.vm.guest.handshake import EVERYTHING, Flags
from voidbus.vm.guest.place import Place


class Watched:
    """A watcher of a directory of this host, and what it said."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = Place(str(root))
        self.place.prepare()
        self.answers: dict[int, str | None] = {}
        self.told: dict[int, Told] = {}
        self.held = threading.Event()
        self.held.set()
        self.telling = threading.Event()
        self._answered = threading.Condition()
        self.watcher = FileWatcher(self.place, self._answer, self._tell)

    def _answer(self, number: int, fault: str | None) -> None:
        with self._answered:
            self.answers[number] = fault
            self._answered.notify_all()

    def _tell(self, number: int, found: FileStat) -> None:
        self.telling.set()
        assert self.held.wait(WAIT)
        self.told[number](found)

    def add(self, path: str) -> tuple[Told, str | None]:
        number = len(self.told)
        self.told[number] = Told()
        self.watcher.add(number, path)
        with self._answered:
            assert self._answered.wait_for(lambda: number in self.answers, WAIT)
        return self.told[number], self.answers[number]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    before = open_files()
    threads = set(threading.enumerate())
    made = Watched(tmp_path)
    yield made
    made.held.set()
    made.watcher.close()
    assert set(threading.enumerate()) - threads == set()
    assert not [name for name in open_files() if "inotify" in name and name not in before]


def test_a_lost_queue_of_events_is_made_up_for_by_looking_again(watched: Watched) -> None:
    told, _ = watched.add("/workspace/a/f")
    other, _ = watched.add("/workspace/other")
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    watched.held.clear()
    (watched.root / "workspace/other").write_text("x")
    assert watched.telling.wait(WAIT)
    for number in range(limit // 2 + 10):  # made and removed: two events each
        name = watched.root / f"workspace/{number}"
        name.mkdir()
        name.rmdir()
    # Nobody is told of these: the queue is full.
    (watched.root / "workspace/a").mkdir()
    (watched.root / "workspace/a/f").write_text("12")
    (watched.root / "workspace/other").write_text("xyz")
    watched.held.set()
    told.wait_for_last(2)
    other.wait_for_last(3)
    # And it goes on by events.
    (watched.root / "workspace/a/f").write_text("12345")
    told.wait_for_last(5)


def test_the_workspace_itself_may_be_replaced(watched: Watched) -> None:
    told, _ = watched.add("/workspace/f")
    (watched.root / "workspace").rename(watched.root / "old")
    (watched.root / "old/f").write_text("1")
    (watched.root / "workspace").mkdir()
    (watched.root / "workspace/new").write_text("22")
    (watched.root / "workspace/new").rename(watched.root / "workspace/f")
    told.wait_for_last(2)
    assert told.sizes == [2]


def test_a_file_removed_and_linked_again_is_told_again(watched: Watched) -> None:
    told, _ = watched.add("/workspace/f")
    kept, file = watched.root / "workspace/kept", watched.root / "workspace/f"
    kept.write_text("123")
    for times in range(1, 4):
        file.hardlink_to(kept)
        told.wait_for(*[3] * times)
        file.unlink()


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("kept"), os.mkfifo])
def test_what_is_no_file_is_not_told(watched: Watched, make: Callable[[Path], None]) -> None:
    told, _ = watched.add("/workspace/f")
    other, _ = watched.add("/workspace/other")
    (watched.root / "workspace/kept").write_text("123")
    make(watched.root / "workspace/f")
    (watched.root / "workspace/other").write_text("1")
    other.wait_for_last(1)
    assert told.sizes == []


def test_a_file_that_becomes_empty_is_told_so(watched: Watched) -> None:
    told, _ = watched.add("/workspace/f")
    (watched.root / "workspace/f").write_text("123")
    told.wait_for_last(3)
    (watched.root / "workspace/f").write_text("")
    told.wait_for_last(0)


def test_a_path_of_too_many_names_is_refused(watched: Watched) -> None:
    with pytest.raises(ValueError, match="deeper than 32 names"):
        watched.watcher.add(0, "/workspace" + "/a" * MAX_NAMES)
    for path in ("/workspace/\0", "/workspace/"):
        with pytest.raises(ValueError, match="not the name of a file"):
            watched.watcher.add(0, path)


def test_a_kernel_without_watches_left_is_a_refusal_that_says_so(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(inotify.Inotify, "add", none_left)
        _, fault = watched.add("/workspace/f")
    assert fault is not None
    assert "/workspace/f: can't be watched" in fault
    assert "max_user_watches" in fault
    told, fault = watched.add("/workspace/f")
    assert fault is None
    (watched.root / "workspace/f").write_text("1")
    told.wait_for_last(1)


def test_a_way_that_can_t_be_watched_any_more_is_tried_again(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, _ = watched.add("/workspace/a/f")
    refused = threading.Event()

    def none_left(*_: object) -> int:
        refused.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(inotify.Inotify, "add", none_left)
        (watched.root / "workspace/a").mkdir()
        assert refused.wait(WAIT)
        (watched.root / "workspace/a/f").write_text("1")
    told.wait_for_last(1)
    (watched.root / "workspace/a/f").write_text("12")
    told.wait_for_last(2)


def test_a_host_that_is_gone_ends_the_watching(tmp_path: Path) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    place = Place(str(tmp_path))
    place.prepare()
    watcher = FileWatcher(place, lambda *_: None, gone)
    (tmp_path / "workspace/f").write_text("1")
    watcher.add(1, "/workspace/f")
    watcher.close()


# -- the host's side ----------------------------------------------------------------------


@pytest.fixture
def channel_to() -> Iterator[MakeChannel]:
    with raw_guests() as make:
        yield make


def there(size: int) -> bytes:
    return encode_file_stat(FileStat(True, size))


class Watching(threading.Thread):
    """A ``watch_file`` under way on a thread of its own."""

    def __init__(self, channel: GuestChannel, timeout: float = WAIT) -> None:
        super().__init__()
        self.told = Told()
        self.fault: ChannelFault | None = None
        self._channel, self._timeout = channel, timeout
        self.start()

    def run(self) -> None:
        try:
            self._channel.watch_file("/workspace/f", self.told, self._timeout)
        except ChannelFault as fault:
            self.fault = fault

    def ending(self) -> ChannelFault | None:
        self.join(WAIT)
        assert not self.is_alive()
        return self.fault


def test_a_guest_s_notices_are_told_until_the_channel_ends(channel_to: MakeChannel) -> None:
    channel, guest = channel_to(EVERYTHING)
    watching = Watching(channel)
    kind, number, body = guest.message()
    assert (kind, decode_path(body)) == (MessageType.WATCH_FILE, "/workspace/f")
    guest.send(MessageType.WATCH_FILE_RESPONSE, number, b'{"success":true,"error":null}')
    for size in (1, 2, 3):
        guest.send(MessageType.FILE_CHANGED, number, there(size))
    watching.told.wait_for(1, 2, 3)
    assert watching.ending() is None


def test_a_guest_that_won_t_watch_is_a_refusal(channel_to: MakeChannel) -> None:
    channel, guest = channel_to(EVERYTHING)
    watching = Watching(channel)
    _, number, _ = guest.message()
    guest.send(MessageType.WATCH_FILE_RESPONSE, number, b'{"success":false,"error":"full"}')
    fault = watching.ending()
    assert fault is not None
    assert (fault.reason, fault.detail) == (FaultReason.REFUSED, "watch of /workspace/f: full")


def test_a_watch_without_an_answer_ends_at_its_deadline(channel_to: MakeChannel) -> None:
    channel, _ = channel_to(EVERYTHING)
    fault = Watching(channel, 0.05).ending()
    assert fault is not None
    assert fault.reason == FaultReason.DEADLINE


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (MessageType.FILE_CHANGED, b'{"exists":false}'),
        (MessageType.FILE_CHANGED, b"garbage"),
        (MessageType.WATCH_FILE_RESPONSE, b'{"success":true}'),
        (MessageType.EXEC_OUTPUT_CHUNK, b"{}"),
    ],
)
def test_a_guest_that_breaks_the_protocol_of_a_watch_ends_its_channel(
    channel_to: MakeChannel, kind: MessageType, body: bytes
) -> None:
    channel, guest = channel_to(EVERYTHING)
    watching = Watching(channel)
    _, number, _ = guest.message()
    guest.send(MessageType.WATCH_FILE_RESPONSE, number, b'{"success":true}')
    assert watching.ending() is None
    guest.send(kind, number, body)
    with pytest.raises(ChannelFault) as caught:
        channel.ping(WAIT)
    assert caught.value.reason == FaultReason.PROTOCOL


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([MessageType.WATCH_FILE_RESPONSE, MessageType.FILE_CHANGED]),
            st.integers(1, 2),
            st.sampled_from([b'{"success":true}', b'{"success":false}', b"{}", there(1), b""]),
        ),
        max_size=5,
    )
)
def test_whatever_a_guest_answers_a_watch_ends(sent: list[tuple[int, int, bytes]]) -> None:
    channel, guest = raw_guest(EVERYTHING)
    try:
        watching = Watching(channel)
        guest.message()
        try:
            for message in sent:
                guest.send(*message)
        except ConnectionError:
            pass
        guest.sock.close()
        watching.ending()
    finally:
        channel.close()


class Contract:
    """A guest of the base protocol whose one file has the sizes it is told to have."""

    def __init__(self, guest: RawPeer) -> None:
        self._guest = guest

    def answer(self, *bodies: bytes) -> None:
        """Answer that many questions."""
        for body in bodies:
            kind, number, question = self._guest.message()
            assert (kind, decode_path(question)) == (MessageType.FILE_STAT, "/workspace/f")
            self._guest.send(MessageType.FILE_STAT_RESPONSE, number, body)


@pytest.fixture
def contract(
    channel_to: MakeChannel, monkeypatch: pytest.MonkeyPatch
) -> tuple[GuestChannel, Contract]:
    monkeypatch.setattr(GuestChannel, "poll_seconds", 0.001)
    channel, guest = channel_to(Flags.MULTIPLEX)
    return channel, Contract(guest)


MISSING = encode_file_stat(FileStat(False))
FAILED = encode_file_stat(FileStat(False, None, "Permission denied"))


def test_a_guest_of_the_base_protocol_is_asked_for_the_file(
    contract: tuple[GuestChannel, Contract],
) -> None:
    channel, guest = contract
    told = Told()
    channel.watch_file("/workspace/f", told, WAIT)
    # Growing is not told before it has ended, nor is what was told before.
    guest.answer(MISSING, there(0), there(5), FAILED, there(7), there(9), there(9), there(9))
    told.wait_for(9)
    guest.answer(MISSING, MISSING, there(9), there(9))
    told.wait_for(9, 9)


def test_a_file_that_is_there_at_the_first_question_is_told_at_once(
    contract: tuple[GuestChannel, Contract],
) -> None:
    channel, guest = contract
    told = Told()
    channel.watch_file("/workspace/f", told, WAIT)
    guest.answer(there(4))
    told.wait_for(4)


def test_a_busy_guest_of_the_base_protocol_is_asked_no_second_time(
    contract: tuple[GuestChannel, Contract], channel_to: MakeChannel
) -> None:
    channel, guest = contract
    channel.watch_file("/workspace/f", Told(), WAIT)
    asked = threading.Event()
    # Another file's questions show that time passes.
    channel.watch_file("/workspace/g", lambda _: asked.set(), WAIT)
    peer = guest._guest
    first = peer.message()
    assert decode_path(first[2]) == "/workspace/f"
    for size in range(20):
        _, number, body = peer.message()
        assert decode_path(body) == "/workspace/g"
        peer.send(MessageType.FILE_STAT_RESPONSE, number, there(size // 2))
    assert asked.wait(WAIT)


def test_what_is_asked_for_is_held_to_the_roots_and_to_a_number(
    contract: tuple[GuestChannel, Contract],
) -> None:
    channel, _ = contract
    with pytest.raises(ChannelFault, match="outside /workspace"):
        channel.watch_file("/etc/passwd", Told(), WAIT)
    for number in range(MAX_WATCHED):
        channel.watch_file(f"/workspace/{number}", Told(), WAIT)
    with pytest.raises(ChannelFault, match="16 files are watched already"):
        channel.watch_file("/workspace/one-more", Told(), WAIT)


def test_an_ended_channel_watches_nothing(contract: tuple[GuestChannel, Contract]) -> None:
    channel, _ = contract
    channel.watch_file("/workspace/f", Told(), WAIT)
    channel.close()
    with pytest.raises(ChannelFault) as caught:
        channel.watch_file("/workspace/f", Told(), WAIT)
    assert caught.value.reason == FaultReason.CLOSED
