"""Guests that flood their host: memory stays bounded, and the machine is slowed or ends."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
from guest_vm import with_init
from machine_kit import WAIT, MakeGuest, Running, open_files, shell
from patience import SLOW
from vm_kit import own_memory

from voidbus.vm.channel import ExecCall
from voidbus.vm.machine import Forward, MachineError

pytestmark = pytest.mark.timeout(300 * SLOW)

BOUND = 64 * 1024 * 1024
"""What a flood may add to this process's memory (bytes): buffers of every layer, and slack."""

_CONSOLE_FLOOD = """#!/bin/sh
/bin/busybox mount -t devtmpfs dev /dev
exec /bin/busybox yes 'a line that never ends being written' > /dev/console
"""

# Answers the handshake, then sends chunks of programs nobody runs, and nothing else.
_CHANNEL_FLOOD = """#!/usr/bin/python3.11 -IS
import sys
sys.path.append("/usr/lib/voidbus")
from guest.connection import Connection

def flood(self, request_id, body):
    size = 0x100000
    frame = (size + 4).to_bytes(4, "little") + bytes([15]) + (77777).to_bytes(4, "little")
    while True:
        self._sock.sendall(frame + bytes(size))

Connection._configure = flood
from guest.init import main
sys.exit(main())
"""


def test_a_guest_that_floods_its_console_is_slowed_and_its_start_ends_in_time(
    make: MakeGuest, tmp_path: Path
) -> None:
    guest = make(**with_init(tmp_path, _CONSOLE_FLOOD))
    before = own_memory()
    with pytest.raises(MachineError, match="a line that never ends"):
        guest.machine.start(25)
    assert len(guest.machine.console()) <= 64 * 1024
    assert own_memory() - before < BOUND


def test_a_program_whose_output_nobody_reads_waits_and_fills_no_memory(make: MakeGuest) -> None:
    guest = make().start()
    go_on, ended = threading.Event(), threading.Event()
    before = own_memory()
    call = ExecCall("sh", ("-c", "yes | head -c 200000000"))

    def never(stream: str, data: bytes) -> None:
        go_on.wait(WAIT)

    handle = guest.channel.exec(call, never, lambda _: ended.set())
    assert not ended.wait(5)
    assert own_memory() - before < BOUND
    handle.signal(9)
    go_on.set()
    assert ended.wait(WAIT)


def test_a_flood_into_a_forward_that_nobody_reads_fills_no_memory(make: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        guest = make(forwards=(Forward(0, ("127.0.0.1", port)),)).start()
        inside = guest.channel.forwards[0]
        before = own_memory()
        running = shell(guest.channel, f"yes | nc 127.0.0.1 {inside}", timeout=60)
        held, _ = server.accept()
        with held:
            # It is held, never read; requests beside it are answered all the same.
            for _ in range(20):
                guest.channel.ping(WAIT)
            waiting = threading.Event()
            assert not waiting.wait(3)
            assert own_memory() - before < BOUND
        running.handle.signal(9)
        running.result()


def test_many_connections_into_a_forward_are_bounded(make: MakeGuest) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        port = server.getsockname()[1]
        guest = make(forwards=(Forward(0, ("127.0.0.1", port)),)).start()
        inside = guest.channel.forwards[0]
        files = len(open_files())
        script = (
            "import socket\n"
            "held=[]\n"
            "for _ in range(900):\n"
            "    s=socket.socket()\n"
            "    s.settimeout(5)\n"
            "    try:\n"
            f"        s.connect(('127.0.0.1',{inside}))\n"
            "    except OSError:\n"
            "        s.close()\n"
            "    else:\n"
            "        held.append(s)\n"
            "print('done',flush=True)\n"
            "import time\n"
            "time.sleep(60)\n"
        )
        running = Running(guest.channel, ExecCall("python3", ("-c", script)))
        running.wait_for(b"done")
        assert len(open_files()) - files <= 600
        guest.channel.ping(WAIT)
        running.handle.signal(9)
        running.result()


def test_a_guest_that_floods_the_control_channel_ends_only_its_own_start(
    make: MakeGuest, tmp_path: Path
) -> None:
    guest = make(**with_init(tmp_path, _CHANNEL_FLOOD))
    before = own_memory()
    with pytest.raises(MachineError, match="configure"):
        guest.machine.start(30)
    assert own_memory() - before < BOUND
    assert guest.exited.wait(WAIT)
