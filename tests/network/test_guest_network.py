"""A real guest's network: what its programs reach, and what they don't."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import pytest
from guest_vm import GuestVm
from network_kit import HOST_ADDRESS, OUTSIDE_ADDRESS, entered, host_and_outside

from voidbus.vm.channel import ExecCall, ExecResult, GuestChannel
from voidbus.vm.faults import ChannelFault
from voidbus.vm.guest.handshake import EVERYTHING, Flags
from voidbus.vm.network.user_network import MAC, MTU, NetworkRules, UserNetwork

pytestmark = [
    pytest.mark.needs("vm"),
    pytest.mark.needs("passt"),
    pytest.mark.needs("root"),
    pytest.mark.timeout(240),
]

SIZE = 3_000_000

PROGRAM = """
import errno, json, socket, sys
host, outside, size = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
found = {"mtu": int(open("/sys/class/net/eth0/mtu").read())}

def exchange(address):
    with socket.create_connection(address, 30) as peer:
        peer.sendall(bytes(size))
        got = 0
        while data := peer.recv(65536):
            got += len(data)
        return got

def refusal(address):
    try:
        socket.create_connection(address, 10).close()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))

found["host"] = exchange(("10.0.2.2", host))
found["outside"] = exchange((sys.argv[4], outside))
found["other port"] = refusal(("10.0.2.2", host + 1))
found["host's address"] = refusal((sys.argv[5], host))
found["link-local"] = refusal(("169.254.169.254", 80))
print(json.dumps(found))
"""


@contextmanager
def echoing(address: str, namespace: int | None = None) -> Iterator[int]:
    """The port of a server that takes ``SIZE`` bytes and then sends as many."""
    with nullcontext() if namespace is None else entered(namespace):
        server = socket.create_server((address, 0))
    server.settimeout(120)

    def serve() -> None:
        try:
            peer, _ = server.accept()
        except OSError:
            return  # nobody came
        with peer:
            peer.settimeout(120)
            got = 0
            while got < SIZE:
                got += len(peer.recv(65536))
            peer.sendall(bytes(got))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        server.close()


def run(channel: GuestChannel, *command: str) -> str:
    output: list[bytes] = []
    done = threading.Event()
    results: list[ExecResult | ChannelFault] = []

    def on_done(result: ExecResult | ChannelFault) -> None:
        results.append(result)
        done.set()

    call = ExecCall(program=command[0], args=command[1:], timeout=120)
    channel.exec(call, lambda _, data: output.append(data), on_done)
    assert done.wait(130)
    said = b"".join(output).decode(errors="replace")
    (result,) = results
    assert isinstance(result, ExecResult), result
    assert result.exit_code == 0, (result, said)
    return said


@pytest.mark.parametrize("mtu", [1500, MTU])
def test_a_guest_reaches_the_named_port_and_the_outside_and_no_more(
    tmp_path: Path, mtu: int
) -> None:
    failures: list[str] = []
    with (
        host_and_outside() as outside,
        closing(
            UserNetwork(
                tmp_path,
                NetworkRules(),
                name="box",
                on_failed=failures.append,
                on_lease=lambda _: None,
            )
        ) as network,
    ):
        network.start(10)
        card = f"virtio-net-device,netdev=net0,mac={MAC},host_mtu={mtu}"
        path = network.socket_path
        stream = f"stream,id=net0,server=off,addr.type=unix,addr.path={path}"
        with GuestVm(("voidbox.network=1",), options=("-netdev", stream, "-device", card)) as vm:
            channel = vm.channel(EVERYTHING & ~Flags.CONFIGURE)
            with (
                echoing("127.0.0.1") as near,
                echoing(OUTSIDE_ADDRESS, outside) as far,
            ):
                network.allow_host_port(near)
                addresses = (str(near), str(far), str(SIZE), OUTSIDE_ADDRESS, HOST_ADDRESS)
                said = run(channel, "python3", "-c", PROGRAM, *addresses)
        stats = network.stats
    assert json.loads(said) == {
        "mtu": mtu,
        "host": SIZE,
        "outside": SIZE,
        "other port": "ECONNREFUSED",
        "host's address": "ECONNREFUSED",
        "link-local": "ECONNREFUSED",
    }
    assert failures == []
    assert stats.sent_bytes > 2 * SIZE
    assert stats.received_bytes > 2 * SIZE
