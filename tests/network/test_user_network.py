"""The network as a guest has it: the filter before the real passt, on a host made for the test."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from network_kit import (
    ACK,
    FIN,
    HOST_ADDRESS,
    OUTSIDE_ADDRESS,
    RST,
    SYN,
    Card,
    arp,
    entered,
    host_and_outside,
    ip,
    tcp,
    udp,
)

from voidbus.vm.guest.descendants import stat_fields
from voidbus.vm.machine import Lease
from voidbus.vm.network.user_network import (
    NetworkError,
    NetworkRules,
    NetworkStats,
    UserNetwork,
    available,
)

pytestmark = [pytest.mark.needs("passt"), pytest.mark.needs("root")]


class Network(UserNetwork):
    """A network that keeps what it tells."""

    def __init__(self, folder: Path, rules: NetworkRules | None = None) -> None:
        self.failures: list[str] = []
        self.failed = threading.Event()
        self.leases: list[Lease] = []
        super().__init__(
            folder,
            rules or NetworkRules(),
            name="box",
            on_failed=self._note,
            on_lease=self.leases.append,
        )

    def _note(self, reason: str) -> None:
        self.failures.append(reason)
        self.failed.set()

    @property
    def passt(self) -> int:
        pid = self.leases[0].pid
        assert pid is not None
        return pid


@pytest.fixture
def outside() -> Iterator[int]:
    """The namespace outside the host that the test runs on."""
    with host_and_outside() as namespace:
        yield namespace


@pytest.fixture
def network(tmp_path: Path, outside: int) -> Iterator[Network]:
    with closing(Network(tmp_path)) as network:
        network.start(10)
        yield network


@pytest.fixture
def card(network: Network) -> Iterator[Card]:
    with Card(network.socket_path) as card:
        yield card


def listener(address: str) -> socket.socket:
    server = socket.create_server((address, 0))
    server.settimeout(10)
    return server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def talk(card: Card, server: socket.socket, address: str) -> None:
    """A connection of the guest from its start to its end, with a word each way."""
    port = port_of(server)
    first = card.ask(tcp(address, port))
    assert (first.by, first.by_port, first.port) == (address, port, 40000)
    assert first.flags == SYN | ACK
    peer, _ = server.accept()
    with peer:
        peer.settimeout(10)
        number, theirs = 1001, first.number + 1
        card.send(tcp(address, port, ACK, number=number, acknowledged=theirs))
        card.send(tcp(address, port, ACK, number=number, acknowledged=theirs, data=b"hello"))
        assert peer.recv(5, socket.MSG_WAITALL) == b"hello"
        peer.sendall(b"world")
        said = b""
        while said != b"world":
            said += card.segment().data
        theirs += len(said)
        card.send(tcp(address, port, ACK | FIN, number=number + 5, acknowledged=theirs))
        assert peer.recv(1) == b""


def test_passt_can_start_here() -> None:
    assert available() is None


def test_a_named_port_of_the_host_is_reached_through_the_gateway(
    network: Network, card: Card
) -> None:
    with listener("127.0.0.1") as server:
        network.allow_host_port(port_of(server))
        talk(card, server, "10.0.2.2")
    stats = network.stats
    assert stats.sent_frames == 4
    assert stats.received_frames >= 2
    assert stats.answered == stats.dropped == 0


def test_another_port_of_the_host_is_refused_at_once(network: Network, card: Card) -> None:
    with listener("127.0.0.1") as server, listener("127.0.0.1") as other:
        network.allow_host_port(port_of(other))
        assert card.ask(tcp("10.0.2.2", port_of(server))).flags == RST | ACK
    assert network.stats == NetworkStats(answered=1)


def test_an_allowed_port_where_nobody_listens_is_refused(network: Network, card: Card) -> None:
    with listener("127.0.0.1") as server:
        port = port_of(server)
    network.allow_host_port(port)
    assert card.ask(tcp("10.0.2.2", port)).flags & RST


@pytest.mark.parametrize("address", ["127.0.0.1", HOST_ADDRESS, "127.1.2.3", "0.0.0.0"])
def test_the_hosts_own_addresses_are_refused(card: Card, address: str) -> None:
    with listener("0.0.0.0") as server:
        assert card.ask(tcp(address, port_of(server))).flags == RST | ACK


def test_an_address_the_host_gets_later_is_refused_too(card: Card) -> None:
    ip("addr add 203.0.113.7/32 dev lo")
    with listener("203.0.113.7") as server:
        assert card.ask(tcp("203.0.113.7", port_of(server))).flags == RST | ACK


def test_the_broadcast_address_of_a_cable_is_refused(card: Card) -> None:
    card.send(udp("198.51.100.255", 9))
    assert card.receive()[34:36] == b"\x03\x0d"


def test_the_outside_is_reached(card: Card, outside: int) -> None:
    with entered(outside):
        server = listener(OUTSIDE_ADDRESS)
    with server:
        talk(card, server, OUTSIDE_ADDRESS)


def test_a_place_without_a_route_is_refused(card: Card) -> None:
    assert card.ask(tcp("203.0.113.1", 443)).flags == RST | ACK


def test_a_link_local_address_is_refused_though_it_has_a_route(card: Card) -> None:
    ip("route add 169.254.0.0/16 dev cable")
    assert card.ask(tcp("169.254.169.254", 80)).flags == RST | ACK


def test_datagrams_reach_the_outside_and_come_back(card: Card, outside: int) -> None:
    with entered(outside):
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        peer.settimeout(10)
        peer.bind((OUTSIDE_ADDRESS, 0))
    with peer:
        card.send(udp(OUTSIDE_ADDRESS, port_of(peer), b"there"))
        said, address = peer.recvfrom(100)
        assert said == b"there"
        peer.sendto(b"back", address)
        assert card.receive()[42:] == b"back"


@pytest.mark.needs("nameserver")
def test_names_are_asked_of_the_hosts_name_server(tmp_path: Path, outside: int) -> None:
    lines = Path("/etc/resolv.conf").read_text().splitlines()
    address = next(line.split()[1] for line in lines if line.startswith("nameserver "))
    away = not address.startswith("127.")
    if away:
        ip(f"route add {address}/32 dev cable")
    with entered(outside) if away else nullcontext():
        if away:
            ip(f"addr add {address}/32 dev cable")
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with server:
        server.settimeout(10)
        server.bind((address, 53))
        with closing(Network(tmp_path)) as network:
            network.start(10)
            with Card(network.socket_path) as card:
                card.send(udp("10.0.2.3", 53, b"question"))
                question, asker = server.recvfrom(100)
                assert question == b"question"
                server.sendto(b"answer", asker)
                answer = card.receive()
    assert answer[26:30] == bytes([10, 0, 2, 3])
    assert answer[42:] == b"answer"


def test_a_flood_of_every_size_loses_nothing_of_what_follows(network: Network, card: Card) -> None:
    """Frames that pass, so that passt is the one who has to keep up with them."""
    with listener("127.0.0.1") as server:
        port = port_of(server)
        network.allow_host_port(port)
        sizes = [1, 9, 333, 1460, 9000, 32000, 32728]
        first = card.ask(tcp("10.0.2.2", port))
        theirs = first.number + 1
        peer, _ = server.accept()
        with peer:
            peer.settimeout(10)
            # Data from far outside the window: passt reads each frame, and keeps none.
            for turn in range(300):
                data = bytes(sizes[turn % len(sizes)])
                far = tcp("10.0.2.2", port, ACK, number=900, acknowledged=theirs, data=data[:90])
                long = tcp(
                    "10.0.2.2", port, ACK, number=1001 - len(data), acknowledged=theirs, data=data
                )
                card.send(far, long, far)
            card.send(tcp("10.0.2.2", port, ACK, number=1001, acknowledged=theirs, data=b"end"))
            assert peer.recv(3, socket.MSG_WAITALL) == b"end"
    assert network.failures == []


def test_garbage_in_frames_does_no_harm(network: Network, card: Card) -> None:
    card.send(b"", b"\0", os.urandom(14), os.urandom(1500), os.urandom(60000), bytes(65549))
    card.send(arp())
    assert card.receive()[12:14] == b"\x08\x06"
    assert network.stats == NetworkStats(answered=1, dropped=6)


def test_a_frame_longer_than_any_ends_the_network_with_a_reason(
    network: Network, card: Card
) -> None:
    card.socket.sendall(b"\xff\xff\xff\xff")
    assert network.failed.wait(10)
    assert "a frame of 4294967295 bytes" in network.failures[0]
    assert card.socket.recv(1) == b""
    assert not Path(f"/proc/{network.passt}").exists()


def test_a_machine_that_takes_nothing_holds_up_only_itself(network: Network) -> None:
    with Card(network.socket_path) as card:
        card.socket.settimeout(1)
        refused = tcp("10.0.2.2", 1)
        for _ in range(20000):
            card.send(refused)
    network.close()
    assert network.failures == []


def test_the_machines_end_is_no_failure(network: Network) -> None:
    with Card(network.socket_path) as card:
        card.socket.sendall(b"\0\0")
    pidfd_gone(network.leases[0])
    network.close()
    assert network.failures == []


def test_passts_end_is_told_with_its_reason(network: Network, card: Card) -> None:
    os.kill(network.passt, signal.SIGKILL)
    assert network.failed.wait(10)
    network.close()
    (reason,) = network.failures
    assert "passt has ended (passt: was killed by SIGKILL" in reason


def test_passts_end_before_the_machine_came_is_told_too(network: Network) -> None:
    os.kill(network.passt, signal.SIGKILL)
    assert network.failed.wait(10)


def test_close_leaves_nothing(tmp_path: Path, outside: int) -> None:
    threads, files = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    network = Network(tmp_path)
    network.close()
    with pytest.raises(NetworkError, match="closed already"):
        network.start(10)
    network = Network(tmp_path)
    network.start(10)
    assert stat.S_IMODE(network.socket_path.stat().st_mode) == 0o600
    with pytest.raises(NetworkError, match="started or closed already"):
        network.start(10)
    with Card(network.socket_path) as card:
        card.send(arp())
        card.receive()
        network.close()
        network.close()
        assert card.socket.recv(1) == b""
    assert not Path(f"/proc/{network.passt}").exists()
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert network.failures == []


def test_a_second_client_is_not_let_in(network: Network, card: Card) -> None:
    card.send(arp())
    card.receive()
    with pytest.raises(OSError), Card(network.socket_path):
        pass


def test_passt_has_no_rights_and_no_environment_of_ours(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = Path(f"/proc/{network.passt}/status").read_text()
    assert "CapEff:\t0000000000000000" in status
    assert "Seccomp:\t2" in status
    assert "Uid:\t0" not in status


def test_a_path_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    network = Network(tmp_path / ("x" * 108))
    with pytest.raises(NetworkError, match="use a folder with a shorter path"):
        network.start(10)
    network.close()


def test_a_missing_passt_is_told_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with closing(Network(tmp_path)) as network:
        with pytest.raises(NetworkError, match="apt install passt"):
            network.start(10)
        assert list(tmp_path.iterdir()) == []
    assert "apt install passt" in (available() or "")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no user namespaces >&2; exit 1", "exit code 1; no user namespaces"),
        ("exec sleep 60", "passt did not answer in time"),
    ],
)
def test_a_passt_that_does_not_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    program = tmp_path / "bin/passt"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    with (
        closing(Network(tmp_path)) as network,
        pytest.raises(NetworkError, match=reason),
    ):
        network.start(0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


OWNER = """
import sys
from pathlib import Path
from voidbus.vm.network.user_network import NetworkRules, UserNetwork
network = UserNetwork(Path(sys.argv[1]), NetworkRules(), name="box", on_failed=print,
                      on_lease=lambda lease: print(lease.pid, lease.start_time, flush=True))
network.start(10)
sys.stdin.read()
"""


def pidfd_gone(lease: Lease) -> None:
    """Wait until that process is gone."""
    assert lease.pid is not None
    try:
        pidfd = os.pidfd_open(lease.pid)
    except ProcessLookupError:
        return
    try:
        if int(stat_fields(lease.pid)[19]) == lease.start_time:
            assert select.select([pidfd], [], [], 10)[0]
    except (FileNotFoundError, ProcessLookupError):
        pass
    finally:
        os.close(pidfd)


@pytest.mark.parametrize("connected", [True, False])
def test_a_killed_owner_leaves_no_passt(tmp_path: Path, outside: int, connected: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as owner:
        assert owner.stdout is not None
        pid, start_time = map(int, owner.stdout.readline().split())
        if connected:
            with Card(tmp_path / "network.sock") as card:
                card.send(arp())
                card.receive()
                owner.kill()
        owner.kill()
    pidfd_gone(Lease("process", pid, start_time))
