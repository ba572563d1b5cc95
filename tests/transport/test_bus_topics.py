"""Publish and subscribe: numbers, marks, losses, and rights."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from transport_kit import TRANSPORTS, Bus, Look, Signal, Work

from voidbus.transport.address import AddressError
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Right
from voidbus.transport.topics import Gap, Publication


def test_numbers_are_gapless_from_the_mark_on(bus: Bus) -> None:
    for _ in range(3):
        bus.hub.publish("t/x", Look())
    client = bus.leaf("client-a")
    got = Signal()
    subscription = client.subscribe("t/", got)
    assert subscription.wait_ready(5)
    for _ in range(200):
        bus.hub.publish("t/x", Look())
    seen = got.wait(lambda seen: len(seen) == 200)
    assert [p.number for p in seen] == list(range(4, 204))
    assert subscription.lost == 0


def test_a_run_publishes_only_under_its_own_name(bus: Bus) -> None:
    run, client = bus.leaf("run-1", Right.WORK), bus.leaf("client-a")
    got = Signal()
    assert client.subscribe("", got).wait_ready(5)
    run.publish("run-2/x", Work())
    client.publish("client-a/x", Work())
    run.publish("run-1/x", Work())
    seen: list[Publication] = got.wait(lambda seen: any(p.topic == "run-1/x" for p in seen))
    assert [p.topic for p in seen if p.topic == "run-2/x"] == []


def test_a_subscriber_that_raises_keeps_its_node_and_its_subscription(bus: Bus) -> None:
    client = bus.leaf("client-a")
    got = Signal()

    def broken(publication: Publication) -> None:
        got(publication)
        raise RuntimeError("broken")

    assert client.subscribe("t", broken).wait_ready(5)
    bus.hub.publish("t", Look())
    bus.hub.publish("t", Look())
    got.wait(lambda seen: len(seen) == 2)


def test_a_leaf_without_a_topics_endpoint_says_so(ipc_bus: Bus) -> None:
    leaf = Leaf("client-a", ipc_bus.hub.addresses[Right.OPERATE])
    try:
        with pytest.raises(AddressError, match="topics_url"):
            leaf.subscribe("t", lambda _: None)
        assert leaf.wait_up(5)
    finally:
        leaf.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_slow_consumer_learns_exactly_what_it_lost(tmp_path: Path, transport: str) -> None:
    bus = Bus(transport, tmp_path, high_water=10)
    try:
        client = bus.leaf("client-a", high_water=10)
        got, gaps, go = Signal(), Signal(), threading.Event()
        body = "x" * 20_000

        def slow(publication: Publication) -> None:
            go.wait(20)
            got(publication)

        subscription = client.subscribe("t", slow, gaps)
        assert subscription.wait_ready(5)
        for _ in range(2000):
            last = bus.hub.publish("t", Look(text=body))
        sent = Signal()
        bus.hub._loop.call(lambda: sent(True))  # after the queue was flushed once
        sent.wait(bool)
        go.set()

        def complete(seen: list[Publication]) -> bool:
            bus.hub.publish("t", Look(text="more"))
            return bool(seen) and seen[-1].number > last

        seen = got.wait(complete, timeout=20)
        lost = {
            n
            for gap in list(gaps.seen)
            if isinstance(gap, Gap)
            for n in range(gap.first, gap.last + 1)
        }
        numbers = {p.number for p in seen}
        assert lost, [p.number for p in seen][:20]
        assert not lost & numbers
        assert set(range(1, last + 1)) <= lost | numbers
        assert subscription.lost >= len(lost & set(range(1, last + 1)))
    finally:
        bus.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_subscriber_that_comes_in_the_middle_costs_the_others_nothing(
    tmp_path: Path, transport: str
) -> None:
    bus = Bus(transport, tmp_path)
    try:
        steady, restless = bus.leaf("client-a"), bus.leaf("client-b")
        got, gaps = Signal(), Signal()
        assert steady.subscribe("t", got, gaps).wait_ready(5)
        for number in range(3000):
            if number % 100 == 0:
                restless.subscribe("t", lambda _: None)
            last = bus.hub.publish("t", Look(text="x"))
        seen = got.wait(lambda seen: len(seen) == last, timeout=20)
        assert [p.number for p in seen] == list(range(1, last + 1))
        assert not gaps.seen
    finally:
        bus.close()


def test_a_hub_that_is_started_again_begins_a_new_count_and_no_gap(wire_bus: Bus) -> None:
    client = wire_bus.leaf("client-a")
    got, gaps = Signal(), Signal()
    subscription = client.subscribe("t", got, gaps)
    assert subscription.wait_ready(5)
    for _ in range(5):
        wire_bus.hub.publish("t", Look())
    got.wait(lambda seen: len(seen) == 5)
    wire_bus.hub.close()
    hub = wire_bus.start_hub()

    # The subscription comes when the sockets are connected again, some time after the hub is up.
    deadline = time.monotonic() + 10
    while len({p.epoch for p in got.seen}) < 2 and time.monotonic() < deadline:
        last = hub.publish("t", Look())
        threading.Event().wait(0.01)
    seen = got.wait(lambda seen: seen[-1].number >= last)
    assert not gaps.seen
    numbers = [p.number for p in seen if p.epoch == hub.instance]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
