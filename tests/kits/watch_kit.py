"""What every machine must do for ``GuestChannel.watch_file``. Subclass beside
``MachineConformance``, whose fixtures it uses."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import PurePosixPath

import pytest
from machine_kit import WAIT, Guest, MakeGuest, Running, shell

from voidbus.vm.channel import ExecCall, GuestChannel
from voidbus.vm.faults import ChannelFault, FaultReason
from voidbus.vm.guest.file_messages import MAX_WATCHED, FileStat


class Told:
    """The sizes a watched file was told with."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._changed = threading.Condition()

    def __call__(self, found: FileStat) -> None:
        assert found.exists
        assert found.size is not None
        with self._changed:
            self.sizes.append(found.size)
            self._changed.notify_all()

    def wait_for(self, *sizes: int) -> None:
        """Until these are all that was told, in this order."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.sizes[: len(sizes)] == list(sizes), WAIT), (
                self.sizes
            )
            assert len(self.sizes) == len(sizes), self.sizes

    def wait_for_last(self, size: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.sizes[-1:] == [size], WAIT), self.sizes


def watch(channel: GuestChannel, path: str) -> Told:
    told = Told()
    channel.watch_file(path, told, WAIT)
    return told


class FileWatchConformance:
    @pytest.fixture
    def folder(self, shared: Guest, request: pytest.FixtureRequest) -> PurePosixPath:
        """A directory of the guest of the test's own; the channel's watches are one test's."""
        shared.channel = shared.machine.reconnect(WAIT)
        path = PurePosixPath("/workspace/watch", str(request.node.name))
        shared.channel.mkdir(str(path), WAIT)
        return path

    def test_a_file_that_is_there_is_told_at_once(
        self, shared: Guest, folder: PurePosixPath
    ) -> None:
        shared.channel.write_file(f"{folder}/f", b"1234", WAIT)
        watch(shared.channel, f"{folder}/f").wait_for(4)

    def test_a_file_is_told_when_its_writer_has_closed_it_and_not_before(
        self, shared: Guest, folder: PurePosixPath
    ) -> None:
        told, other = (watch(shared.channel, f"{folder}/{name}") for name in ("f", "other"))
        ends(start(shared.channel, folder, "mkfifo go"))
        script = "exec 3>f; echo half >&3; echo up; read x <go; echo rest >&3"
        running = start(shared.channel, folder, script)
        running.wait_for(b"up")
        for size in (1, 2):
            shared.channel.write_file(f"{folder}/other", b"x" * size, WAIT)
            other.wait_for_last(size)  # what happened before has been seen
            ends(start(shared.channel, folder, "cat f"))  # a reader makes nothing complete
        assert told.sizes == []
        ends(start(shared.channel, folder, "echo >go"))
        ends(running)
        told.wait_for(10)

    def test_a_file_moved_or_linked_into_its_place_is_told(
        self, shared: Guest, folder: PurePosixPath
    ) -> None:
        told = watch(shared.channel, f"{folder}/f")
        ends(start(shared.channel, folder, "echo 1 >a; mv a f"))
        told.wait_for(2)
        ends(start(shared.channel, folder, "echo 22 >b; rm f; ln b f"))
        told.wait_for(2, 3)

    def test_a_watch_outlasts_its_directories_and_follows_no_link(
        self, shared: Guest, folder: PurePosixPath
    ) -> None:
        told = watch(shared.channel, f"{folder}/a/b/f")
        ends(start(shared.channel, folder, "mkdir -p a/b; echo 1 >new; mv new a/b/f"))
        told.wait_for_last(2)
        script = "mv a old; mkdir a other; echo 333 >other/f; ln -s ../other a/b"
        ends(start(shared.channel, folder, script))
        ends(start(shared.channel, folder, "echo 4444 >other/f; echo 55555 >old/b/f"))
        ends(start(shared.channel, folder, "rm a/b; mkdir a/b; echo 666666 >new; mv new a/b/f"))
        told.wait_for_last(7)
        assert set(told.sizes) == {2, 7}

    def test_files_are_told_while_programs_run_and_telemetry_streams(
        self, shared: Guest, folder: PurePosixPath
    ) -> None:
        running = shell(shared.channel, "echo up; exec sleep 60")
        running.wait_for(b"up")
        streaming = threading.Event()
        shared.channel.subscribe_telemetry(100, lambda _: streaming.set())
        assert streaming.wait(WAIT)
        told = watch(shared.channel, f"{folder}/f")
        shared.channel.write_file(f"{folder}/f", b"123", WAIT)
        told.wait_for_last(3)
        running.handle.signal(signal.SIGKILL)
        running.result()

    def test_a_file_rewritten_all_the_time_is_told_seldom_and_its_last_state_always(
        self, shared: Guest, folder: PurePosixPath
    ) -> None:
        told = watch(shared.channel, f"{folder}/f")
        script = (
            "import os\n"
            "for n in range(1, 2001):\n"
            " with open('new', 'w') as file: file.write('x' * n)\n"
            " os.rename('new', 'f')\n"
        )
        began = time.monotonic()
        call = ExecCall("python3", ("-c", script), working_dir=str(folder))
        ends(Running(shared.channel, call))
        told.wait_for_last(2000)
        # One for each twentieth of a second, the first, and what a busy machine adds at its end.
        assert len(told.sizes) <= 20 * (time.monotonic() - began) + 2

    @pytest.mark.parametrize(
        "path", ["/etc/passwd", "/workspace/../etc/x", "workspace/x", "/workspacex/y", "/tmp/x"]
    )
    def test_a_file_outside_the_roots_is_not_watched(self, shared: Guest, path: str) -> None:
        with pytest.raises(ChannelFault) as caught:
            shared.channel.watch_file(path, lambda _: None, WAIT)
        assert caught.value.reason == FaultReason.REFUSED

    def test_one_file_more_than_the_most_is_refused_and_the_others_are_told(
        self, shared: Guest, folder: PurePosixPath
    ) -> None:
        told = [watch(shared.channel, f"{folder}/f{n}") for n in range(MAX_WATCHED)]
        with pytest.raises(ChannelFault, match="16 files are watched already"):
            watch(shared.channel, f"{folder}/one-more")
        for n in range(MAX_WATCHED):
            shared.channel.write_file(f"{folder}/f{n}", b"x" * (n + 1), WAIT)
            told[n].wait_for_last(n + 1)

    def test_a_new_channel_watches_anew(self, make: MakeGuest) -> None:
        guest = make().start()
        watch(guest.channel, "/workspace/f")
        channel = guest.machine.reconnect(WAIT)
        told = watch(channel, "/workspace/f")
        channel.write_file("/workspace/f", b"12", WAIT)
        told.wait_for_last(2)


def start(channel: GuestChannel, folder: PurePosixPath, script: str) -> Running:
    return Running(channel, ExecCall("sh", ("-c", script), working_dir=str(folder)))


def ends(running: Running) -> None:
    result = running.result()
    assert (result.exit_code, result.error) == (0, None), result
