"""What the host asks for while the guest's driver comes up."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from vsock_guest import Bench, Packet, bench

from voidbus.vm.devices import vsock_first_requests
from voidbus.vm.devices.vsock_packets import Op

PORT = 1234
WAIT = 20.0


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(vsock_first_requests, "AGAIN_SECONDS", 0.01)
    with bench() as made:
        yield made


def next_packets(setup: Bench) -> list[Packet]:
    """What the guest gets next, once there is something."""
    deadline = time.monotonic() + WAIT
    while not (packets := setup.settle()):
        assert time.monotonic() < deadline
        setup.loop.turn(0.1)
    return packets


def test_a_request_the_driver_has_lost_is_made_again(setup: Bench) -> None:
    host = setup.host_connects(PORT)
    (first,) = setup.settle()
    assert first.op == Op.REQUEST
    for _ in range(3):
        (again,) = next_packets(setup)
        assert again == first
    for _ in range(2):  # some guests answer each
        setup.guest.send(Op.RESPONSE, PORT, first.host_port)
    assert setup.settle() == []
    host.send(b"hello")
    (data,) = setup.settle()
    assert data.data == b"hello"
    setup.loop.turn(0.1)
    assert setup.settle() == [], "what was accepted is not asked for again"


def test_what_was_asked_before_the_driver_came_waits_for_it(setup: Bench) -> None:
    setup.device.queue_stopped(0)
    setup.device.reset()
    setup.host_connects(PORT)
    setup.loop.turn(0.05)
    setup.device.queue_started(0, setup.rx_queue)
    setup.device.queue_notified(0)
    (first,) = setup.settle(fill=False)
    (again,) = next_packets(setup)
    assert first == again


def test_a_refusal_ends_the_asking(setup: Bench) -> None:
    host = setup.host_connects(PORT)
    (first,) = setup.settle()
    setup.guest.send(Op.RST, PORT, first.host_port)
    assert setup.settle() == []
    assert host.recv(1) == b""
    setup.loop.turn(0.1)
    assert setup.settle() == []


def test_a_guest_that_has_spoken_is_asked_once(setup: Bench) -> None:
    setup.accept(40000, 5000)
    setup.host_connects(PORT)
    (request,) = setup.settle()
    assert request.op == Op.REQUEST
    assert setup.loop.turn(0.1) == 0
    assert setup.settle() == []


def test_a_request_the_host_has_given_up_is_not_made_again(setup: Bench) -> None:
    host = setup.host_connects(PORT)
    setup.settle()
    host.close()
    (reset,) = setup.settle()
    assert reset.op == Op.RST
    setup.loop.turn(0.1)
    assert setup.settle() == []
