"""Listening sockets of devices: who may connect, and what happens without descriptors."""

from __future__ import annotations

import os
import resource
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from voidbus.vm.devices.event_loop import EventLoop
from voidbus.vm.devices.unix_listener import UnixListener

WAIT = 20.0


class Listening:
    """A listener whose loop is turned by the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = EventLoop("test", lambda _: None)
        self.taken: list[socket.socket] = []
        self.listener = UnixListener(path, 4, self.taken.append)
        self.listener.listen(self.loop)
        self.loop.at_end(self.listener.close)

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.connect(os.fspath(self.path))
        return client

    def turn_until(self, count: int) -> None:
        deadline = time.monotonic() + WAIT
        while len(self.taken) < count:
            assert time.monotonic() < deadline
            self.loop.turn(0.1)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Listening]:
    made = Listening(tmp_path / "socket")
    yield made
    made.loop.close()
    for sock in made.taken:
        sock.close()


def test_only_its_owner_can_connect_and_the_path_goes_with_it(listening: Listening) -> None:
    assert stat.S_IMODE(listening.path.stat().st_mode) == 0o600
    listening.listener.close()
    listening.listener.close()
    assert not listening.path.exists()


def test_those_who_come_while_it_is_stopped_are_taken_afterwards(listening: Listening) -> None:
    with listening.client():
        assert listening.loop.turn(0) == 0
        listening.listener.start()
        listening.turn_until(1)
        listening.listener.stop()
        with listening.client():
            assert listening.loop.turn(0) == 0
            listening.listener.start()
            listening.turn_until(2)


def test_without_descriptors_it_pauses_and_takes_the_client_later(listening: Listening) -> None:
    listening.listener.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listening.client() as client, ExitStack() as fillers:
        top = client.fileno() + 1
        while (fd := os.open("/", os.O_PATH)) < top:
            fillers.callback(os.close, fd)
        fillers.callback(os.close, fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, hard))
        try:
            assert listening.loop.turn(0) == 1
            assert [listening.loop.turn(0) for _ in range(5)] == [0] * 5
            assert listening.taken == []
            # It may be stopped and started meanwhile.
            listening.listener.stop()
            listening.listener.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        listening.turn_until(1)
        listening.listener.stop()
        assert listening.loop.turn(0.2) <= 1  # the end of the pause takes nobody up again
        with listening.client():
            assert listening.loop.turn(0.2) == 0
        assert len(listening.taken) == 1
