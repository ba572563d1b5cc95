"""Peers that die, stop, or come back, with real processes and real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transport_kit import Answer, Bus, Echo, Look, Mute, Signal, Work

from voidbus.transport.access import ipc_endpoints, secure_directory
from voidbus.transport.admission import token_digest
from voidbus.transport.delivery import Ask
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Right
from voidbus.transport.topics import Publication

_PEER = """
import signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from transport_kit import Mute
from voidbus.transport.access import ipc_endpoints
from voidbus.transport.hub import Hub
from voidbus.transport.leaf import Leaf
endpoints = ipc_endpoints(Path(sys.argv[3]))
if sys.argv[2] == "hub":
    node = Hub("hub", endpoints)
else:
    node = Leaf("run-1", sys.argv[4], token="token")
    assert node.wait_up(10)
node.attach("mute", Mute())
print("ready", flush=True)
signal.pause()
"""


class Peer:
    """A hub or a run node in a process of its own."""

    def __init__(self, role: str, directory: Path, url: str = "") -> None:
        kits = str(Path(__file__).parents[1] / "kits")
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PEER, kits, role, str(directory), url],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return secure_directory(tmp_path / "bus")


@pytest.fixture
def hub_process(directory: Path) -> Iterator[Peer]:
    peer = Peer("hub", directory)
    yield peer
    peer.end()


def reason_of(ask: Ask) -> FaultReason:
    outcome = ask.wait()
    assert isinstance(outcome, Fault), outcome
    return outcome.reason


@pytest.mark.parametrize(("number", "heartbeat"), [(signal.SIGKILL, 30.0), (signal.SIGSTOP, 0.1)])
def test_a_hub_that_dies_or_stops_ends_asks_and_a_new_one_is_found(
    hub_process: Peer, directory: Path, number: int, heartbeat: float
) -> None:
    link = Signal()
    url = ipc_endpoints(directory).rights[Right.OPERATE]
    leaf = Leaf("client-a", url, heartbeat=heartbeat, on_link=link)
    try:
        assert leaf.wait_up(5)
        ask = leaf.ask("hub/mute", Look(), timeout=30)
        hub_process.signal(number)
        assert reason_of(ask) is FaultReason.LINK_LOST
        link.wait(lambda seen: seen[:2] == [True, False])
        hub_process.end()
        second = Peer("hub", directory)
        try:
            link.wait(lambda seen: seen[-1], timeout=10)
            assert leaf.counters["link_full"] == 0
        finally:
            second.end()
    finally:
        leaf.close()


@pytest.mark.parametrize(("number", "timeout"), [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 0.3)])
def test_a_run_process_that_dies_or_stops_ends_its_asks(
    tmp_path: Path, number: int, timeout: float
) -> None:
    bus = Bus("ipc", tmp_path, link_timeout=timeout)
    bus.hub.expect("run-1", token_digest("token"), 0)
    peer = Peer("leaf", tmp_path / "bus", bus.hub.addresses[Right.WORK])
    try:
        ask = bus.hub.ask("run-1/mute", Work(), timeout=30)
        peer.signal(number)
        assert reason_of(ask) is FaultReason.LINK_LOST
        bus.left.wait(lambda seen: seen == ["run-1"])
    finally:
        peer.end()
        bus.close()


def test_a_leaf_joins_again_when_the_hub_is_started_again(bus: Bus) -> None:
    link = Signal()
    leaf = bus.leaf("client-a", on_link=link)
    bus.hub.attach("mute", Mute())
    ask = leaf.ask("hub/mute", Look(), timeout=30)
    bus.hub.close()
    assert reason_of(ask) is FaultReason.LINK_LOST
    assert reason_of(leaf.ask("hub/mute", Look(), timeout=30)) is FaultReason.LINK_LOST
    bus.start_hub().attach("echo", Echo())
    link.wait(lambda seen: seen == [True, False, True])
    assert leaf.ask("hub/echo", Look(text="x"), timeout=5).result() == Answer(text="x")


def test_a_hub_that_ends_before_its_goodbye_is_read_is_lost_and_not_full(bus: Bus) -> None:
    link = Signal()
    leaf = bus.leaf("client-a", on_link=link)

    def end_hub(_: Publication) -> None:
        """Called while the leaf sends, which reads nothing meanwhile."""
        bus.hub.close()
        threading.Event().wait(0.005)  # a send may overlook it for 1 ms: libzmq's max_command_delay

    leaf.subscribe("client-a/", end_hub).wait_ready(5)
    leaf.publish("client-a/x", Look())
    link.wait(lambda seen: seen == [True, False])
    assert leaf.counters["link_full"] == 0


def test_closed_nodes_leave_no_thread_and_no_descriptor(tmp_path: Path) -> None:
    def once(number: int) -> None:
        bus = Bus("ipc", tmp_path / str(number))
        bus.leaf("client-a").subscribe("x", lambda _: None).wait_ready(5)
        bus.close()

    once(0)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - no Path is wanted
    for number in range(1, 4):
        once(number)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - no Path is wanted
