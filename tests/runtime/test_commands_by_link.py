"""A command that is repeated over a link is carried out once, whatever transport it comes by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transport_kit import TRANSPORTS, Answer, Bus, Change

from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.leaf import Leaf


class Counter(Actor):
    """Answers a command with how many it has carried out."""

    mailbox_limit = 32

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.count = 0

    @handles(Change)
    def on_change(self, message: Change, delivery: Delivery) -> Answer:
        self.count += 1
        return Answer(text=str(self.count))


@pytest.fixture(params=TRANSPORTS)
def bus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bus]:
    bus = Bus(request.param, tmp_path)
    system = System(bus.hub)
    system.start(Counter, "counter")
    try:
        yield bus
    finally:
        system.stop(5.0)
        bus.close()


def change(leaf: Leaf, key: str) -> str:
    reply = leaf.ask("hub/counter", Change(), timeout=10, key=key).result()
    assert isinstance(reply, Answer)
    return reply.text


def test_a_repeat_over_a_link_gets_the_first_ones_reply(bus: Bus) -> None:
    client = bus.leaf("client-a")
    assert [change(client, key) for key in ("k", "k", "other", "k", "", "")] == [*"112134"]
    assert change(bus.leaf("client-b"), "k") == "5", "another node's key is another command"
    assert bus.hub.counters["replayed"] == 0


def test_a_repeat_after_the_node_was_started_again_gets_the_first_ones_reply(bus: Bus) -> None:
    client = bus.leaf("client-a")
    assert change(client, "k") == "1"
    client.close()
    bus.left.wait(lambda seen: seen == ["client-a"])
    assert change(bus.leaf("client-a"), "k") == "1"
    assert bus.hub.counters["replayed"] == 0
