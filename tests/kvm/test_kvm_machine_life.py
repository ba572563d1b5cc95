"""The life of a machine on the real `/dev/kvm`, with kernels of a few instructions in place of
Linux: so it runs where KVM only emulates, too."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_metal import code
from machine_kit import WAIT, Guest, MakeGuest, machines_of

from voidbus.vm.devices.vsock import CONNECT_SECONDS
from voidbus.vm.image.cpio import directory, write_archive
from voidbus.vm.kvm.machine import KvmMachine
from voidbus.vm.machine import MachineError, StopStep

pytestmark = pytest.mark.needs("kvm")

START = 0x100_0000
HELLO = """
    66 ba f8 03     ; mov dx, 0x3f8
    b0 68           ; mov al, 'h'
    ee              ; out dx, al
    b0 69           ; mov al, 'i'
    ee              ; out dx, al
    b0 0a           ; mov al, '\\n'
    ee              ; out dx, al
"""
TURN_OFF = """
    66 ba 00 06     ; mov dx, 0x600: the sleep control register
    b0 34           ; mov al, 0x34: S5, now
    ee              ; out dx, al
"""
TELL = """
    bf 00 f0 ff cf  ; mov edi, 0xcffff000
    c6 07 01        ; mov byte [rdi], 1: the first program runs
    c6 07 63        ; mov byte [rdi], 99: no mark
    c6 07 02        ; mov byte [rdi], 2: the agent serves
    c6 07 01        ; mov byte [rdi], 1, again
"""
ENDLESS = """
    eb fe           ; jmp to itself
"""
RESET = """
    0f 0b           ; ud2, for which there is no handler, nor one for that
"""
# Makes the first device's queue 0 one of size 3, and starts it.
BREAK_A_RULE = """
    bf 00 00 00 d0                  ; mov edi, 0xd0000000
    c7 47 70 03 00 00 00            ; mov dword [rdi + 0x70], 3: acknowledged, driver
    c7 47 24 01 00 00 00            ; mov dword [rdi + 0x24], 1: the upper features
    c7 47 20 01 00 00 00            ; mov dword [rdi + 0x20], 1: version 1
    c7 47 70 0b 00 00 00            ; mov dword [rdi + 0x70], 11: features are agreed
    c7 47 38 03 00 00 00            ; mov dword [rdi + 0x38], 3: a queue of size 3
    c7 47 44 01 00 00 00            ; mov dword [rdi + 0x44], 1: it is ready
    c7 47 70 0f 00 00 00            ; mov dword [rdi + 0x70], 15: go
"""


def write_kernel(path: Path, listing: str) -> Path:
    """An ELF file of one segment."""
    content = code(listing)
    head = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        *(b"\x7fELF", 2, 1, 1, 2, 62, 1, START, 64, 0, 0, 64, 56, 1, 0, 0, 0),
    )
    table = struct.pack("<IIQQQQQQ", 1, 5, 120, START, START, len(content), len(content), 1)
    path.write_bytes(head + table + content)
    return path


@pytest.fixture
def make(tmp_path: Path) -> Iterator[MakeGuest]:
    with machines_of(KvmMachine, tmp_path) as build:
        archive = tmp_path / "initramfs.cpio"
        with archive.open("wb") as file:
            write_archive([directory("dev")], file)

        def with_code(listing: str) -> Guest:
            kernel = write_kernel(tmp_path / "kernel", listing)
            return build(kernel=kernel, initramfs=archive, memory_mb=128)

        yield with_code


def failure(guest: Guest, timeout: float = WAIT) -> str:
    with pytest.raises(MachineError) as caught:
        guest.machine.start(timeout)
    return str(caught.value)


def test_a_guest_that_turns_itself_off_is_reported_with_what_it_said(make: MakeGuest) -> None:
    guest = make(HELLO + TURN_OFF + ENDLESS)
    text = failure(guest)
    assert text.startswith("machine m0: the guest has ended: turned off; its console: hi")
    assert guest.exited.wait(WAIT)
    assert [(end.reason, end.exit_code) for end in guest.exits] == [
        ("the guest has ended: turned off", 0)
    ]
    assert guest.machine.console() == b"hi\n"
    assert guest.machine.stop(1) == StopStep.ALREADY_GONE


def test_a_guest_that_resets_is_reported(make: MakeGuest) -> None:
    guest = make(HELLO + RESET)
    assert "the guest has ended: reset by a triple fault" in failure(guest)
    assert guest.exited.wait(WAIT)


def test_a_guest_that_breaks_a_rule_of_a_device_is_ended_with_the_rule(make: MakeGuest) -> None:
    guest = make(BREAK_A_RULE + ENDLESS)
    assert "a queue of size 3" in failure(guest)
    assert guest.exited.wait(WAIT)
    assert "a queue of size 3" in guest.exits[0].reason
    assert guest.exits[0].exit_code == 1


def test_a_guest_that_never_answers_ends_with_its_start(make: MakeGuest) -> None:
    guest = make(HELLO + ENDLESS)
    text = failure(guest, 1.0)
    assert "the guest did not answer" in text
    assert "its console: hi" in text
    assert guest.exited.wait(WAIT)
    assert [end.reason for end in guest.exits] == ["stopped"]


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_a_stop_or_a_kill_during_the_start_ends_it(make: MakeGuest, way: str) -> None:
    guest = make(HELLO + ENDLESS)
    errors: list[str] = []
    thread = threading.Thread(target=lambda: errors.append(failure(guest)))
    thread.start()
    assert guest.leased.wait(WAIT)
    if way == "kill":
        guest.machine.kill()
    else:
        guest.machine.stop(0.2)
    thread.join(WAIT)
    assert errors == ["machine m0: stopped"]
    assert guest.exited.wait(WAIT)
    assert [end.reason for end in guest.exits] == ["stopped"]


def test_connections_end_with_the_machine_and_not_when_it_is_closed(make: MakeGuest) -> None:
    guest = make(HELLO + ENDLESS)
    errors: list[str] = []
    thread = threading.Thread(target=lambda: errors.append(failure(guest)))
    thread.start()
    assert guest.leased.wait(WAIT)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(CONNECT_SECONDS / 2)  # after which it would end by itself
        client.connect(str(guest.machine.spec.scratch / "vsock.sock"))
        client.sendall(b"CONNECT 5000\n")
        guest.machine.kill()
        with contextlib.suppress(ConnectionResetError):  # an end before its line was read
            assert client.recv(10) == b""
    thread.join(WAIT)
    assert errors == ["machine m0: stopped"]


def test_a_machine_starts_once_and_can_be_closed_again_and_again(make: MakeGuest) -> None:
    guest = make(TURN_OFF + ENDLESS)
    failure(guest)
    assert "started already" in failure(guest)
    guest.machine.close()
    guest.machine.close()


def test_what_brought_the_guest_to_us_is_counted_by_cause(make: MakeGuest) -> None:
    guest = make(HELLO + TURN_OFF + ENDLESS)
    failure(guest)
    assert isinstance(guest.machine, KvmMachine)
    assert guest.machine.exits == {"serial port": 3, "power": 1}


def test_a_guest_tells_how_far_its_boot_has_come_and_each_mark_counts_once(
    make: MakeGuest,
) -> None:
    guest = make(TELL + TURN_OFF + ENDLESS)
    began = time.monotonic()
    failure(guest)
    assert isinstance(guest.machine, KvmMachine)
    marks = guest.machine.boot_marks
    assert list(marks) == ["kernel", "init", "agent"]
    moments = list(marks.values())
    assert [began, *moments] == sorted([began, *moments])
