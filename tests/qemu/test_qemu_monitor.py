from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.vm.qemu.monitor import MAX_LINE, Monitor

WAIT = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[Monitor, socket.socket]]:
    with connected() as made:
        yield made


@contextlib.contextmanager
def connected() -> Iterator[tuple[Monitor, socket.socket]]:
    ours, theirs = socket.socketpair()
    monitor = Monitor(ours)
    theirs.settimeout(WAIT)
    try:
        yield monitor, theirs
    finally:
        monitor.close()
        theirs.close()


def event(name: str, **data: object) -> bytes:
    return json.dumps({"event": name, "data": data}).encode() + b"\r\n"


def test_it_asks_for_commands_at_once(pair: tuple[Monitor, socket.socket]) -> None:
    assert json.loads(pair[1].recv(4096)) == {"execute": "qmp_capabilities"}


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("guest-shutdown", "the guest powered itself off"),
        ("guest-panic", "the guest's kernel panicked"),
        ("subsystem-reset", "QEMU ended (subsystem-reset)"),
    ],
)
def test_it_tells_why_the_machine_ended(
    pair: tuple[Monitor, socket.socket], word: str, text: str
) -> None:
    monitor, qemu = pair
    qemu.sendall(b'{"QMP": {}}\r\n' + event("RESUME") + event("SHUTDOWN", reason=word))
    assert monitor.feed()
    assert monitor.cause == text


def test_a_command_gets_its_own_answer(pair: tuple[Monitor, socket.socket]) -> None:
    monitor, qemu = pair
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(monitor.execute("query-status", WAIT)))
    asking.start()
    lines = qemu.makefile("rb")
    lines.readline()
    number = json.loads(lines.readline())["id"]
    qemu.sendall(json.dumps({"return": {"wrong": 1}, "id": number + 1}).encode() + b"\n")
    qemu.sendall(json.dumps({"return": {"status": "running"}, "id": number}).encode() + b"\n")
    monitor.feed()
    asking.join(WAIT)
    lines.close()
    assert answers == [{"status": "running"}]


def test_a_command_ends_when_qemu_does(pair: tuple[Monitor, socket.socket]) -> None:
    monitor, qemu = pair
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(monitor.execute("query-status", WAIT)))
    asking.start()
    lines = qemu.makefile("rb")
    lines.readline()
    lines.readline()
    lines.close()
    qemu.close()
    assert not monitor.feed()
    asking.join(WAIT)
    assert answers == [None]
    assert monitor.execute("query-status", WAIT) is None


def test_a_line_without_end_ends_the_connection(pair: tuple[Monitor, socket.socket]) -> None:
    monitor, qemu = pair

    def flood() -> None:
        with contextlib.suppress(OSError):
            qemu.sendall(b"x" * (2 * MAX_LINE))

    writing = threading.Thread(target=flood)
    writing.start()
    while monitor.feed():
        pass
    monitor.close()
    writing.join(WAIT)
    assert not writing.is_alive()


@given(st.binary(max_size=2000))
def test_no_bytes_make_it_raise(data: bytes) -> None:
    with connected() as (monitor, qemu):
        qemu.sendall(data + b"\n")
        assert monitor.feed()


def test_a_word_of_qemu_can_not_drive_a_terminal(pair: tuple[Monitor, socket.socket]) -> None:
    monitor, qemu = pair
    qemu.sendall(event("SHUTDOWN", reason="\x1b]0;owned\x07\u202e\n"))
    assert monitor.feed()
    assert monitor.cause == "QEMU ended (]0;owned)"
