"""The delivery contract, over every transport."""

from __future__ import annotations

import math

import pytest
from transport_kit import Answer, Bus, Change, Echo, Look, Mute, Signal, Work

from voidbus.transport.delivery import Ask, Delivery, ReplyStore
from voidbus.transport.envelope import BODY_LIMIT
from voidbus.transport.fault import BusError, Fault, FaultReason
from voidbus.transport.message import Right


def reason_of(ask: Ask) -> FaultReason:
    outcome = ask.wait()
    assert isinstance(outcome, Fault), outcome
    return outcome.reason


def test_asks_cross_in_both_directions_with_raw_attachments(bus: Bus) -> None:
    client, run = bus.leaf("client-a"), bus.leaf("run-1", Right.WORK)
    bus.hub.attach("echo", Echo())
    run.attach("echo", Echo())
    raw = bytes(range(256))
    for node, dest in ((client, "hub/echo"), (bus.hub, "run-1/echo"), (client, "run-1/echo")):
        ask = node.ask(dest, Look(text=dest), timeout=5, attachments=[raw, b""])
        assert ask.result() == Answer(text=dest)
        assert list(ask.attachments) == [raw, b""]


def test_tells_arrive_in_the_order_they_were_sent(bus: Bus) -> None:
    client = bus.leaf("client-a")
    mute = Mute()
    bus.hub.attach("mute", mute)
    for number in range(500):
        assert client.tell("hub/mute", Look(text=str(number))) is None
    got = mute.wait_for(500)
    assert [d.message.text for d in got if isinstance(d.message, Look)] == [
        str(number) for number in range(500)
    ]


@pytest.mark.parametrize(
    "reason", [FaultReason.MAILBOX_FULL, FaultReason.MAILBOX_CLOSED, FaultReason.OVERLOADED]
)
def test_what_a_receiver_will_not_take_comes_back_with_its_reason(
    bus: Bus, reason: FaultReason
) -> None:
    client = bus.leaf("client-a")
    echo = Echo()
    echo.reason = reason
    bus.hub.attach("echo", echo)
    assert reason_of(client.ask("hub/echo", Look(), timeout=5)) is reason


def test_asks_of_nobody_end_at_once(bus: Bus) -> None:
    client = bus.leaf("client-a")
    assert reason_of(client.ask("hub/none", Look(), timeout=5)) is FaultReason.NO_SUCH_ACTOR
    assert reason_of(client.ask("run-9/x", Look(), timeout=5)) is FaultReason.NO_SUCH_NODE
    assert reason_of(bus.hub.ask("run-9/x", Look(), timeout=5)) is FaultReason.NO_SUCH_NODE


def test_expired_work_is_not_delivered(bus: Bus) -> None:
    client = bus.leaf("client-a")
    echo = Echo()
    bus.hub.attach("echo", echo)
    assert reason_of(client.ask("hub/echo", Look(), timeout=-1)) is FaultReason.EXPIRED
    assert isinstance(client.ask("hub/echo", Look(text="after"), timeout=5).wait(), Answer)
    assert [d.message for d in echo.got] == [Look(text="after")]


def test_a_reply_after_the_deadline_is_dropped_and_counted(bus: Bus) -> None:
    client = bus.leaf("client-a")
    mute = Mute()
    bus.hub.attach("mute", mute)
    bus.hub.attach("echo", Echo())
    assert reason_of(client.ask("hub/mute", Look(), timeout=0.05)) is FaultReason.EXPIRED
    ended = Signal()
    client.ask("hub/mute", Look(), timeout=0.05, on_end=ended)
    ended.wait(lambda seen: len(seen) == 1)
    for delivery in mute.wait_for(1):
        delivery.reply(Answer())
        delivery.fail(FaultReason.FAILED, "a second answer has no effect")
    client.ask("hub/echo", Look(), timeout=5).result()
    assert client.counters["late_replies"] >= 1
    assert client.counters["returned_tells"] == 0


@pytest.mark.parametrize("dest", ["hub/none", "run-1/none", "run-9/none"])
def test_an_undeliverable_tell_comes_back_to_its_sender(bus: Bus, dest: str) -> None:
    client, _ = bus.leaf("client-a"), bus.leaf("run-1", Right.WORK)
    home = Mute()
    client.attach("home", home)
    assert client.tell(dest, Look(), sender="home") is None
    (returned,) = home.wait_for(1)
    assert isinstance(returned.message, Fault)
    assert returned.message.address == dest


def test_a_reply_too_large_to_travel_reaches_the_asker_as_a_fault(bus: Bus) -> None:
    class Huge(Echo):
        def handle(self, delivery: Delivery) -> None:
            delivery.reply(Answer(text="x" * (BODY_LIMIT + 1)))

    client = bus.leaf("client-a")
    bus.hub.attach("huge", Huge())
    assert reason_of(client.ask("hub/huge", Look(), timeout=5)) is FaultReason.TOO_LARGE
    large = Look(text="x" * (BODY_LIMIT + 1))
    assert reason_of(client.ask("hub/huge", large, timeout=5)) is FaultReason.TOO_LARGE
    many = client.ask("hub/huge", Look(), timeout=5, attachments=[b""] * 17)
    assert reason_of(many) is FaultReason.TOO_LARGE


@pytest.mark.parametrize("timeout", [math.inf, 1e13, math.nan])
def test_a_deadline_that_is_no_time_is_refused_where_it_is_given(bus: Bus, timeout: float) -> None:
    client = bus.leaf("client-a")
    bus.hub.attach("x", Echo())
    assert reason_of(client.ask("hub/x", Look(), timeout=timeout)) is FaultReason.INVALID
    assert client.tell("hub/x", Look(), timeout=timeout) is FaultReason.INVALID
    assert client.ask("hub/x", Look(), timeout=5).result()
    assert bus.hub.counters["malformed"] == 0


def test_fields_that_cannot_be_written_end_the_ask_and_not_the_node(bus: Bus) -> None:
    client = bus.leaf("client-a")
    bus.hub.attach("echo", Echo())
    for odd in ({"key": "a\0b"}, {"trace": "\ud800"}, {"generation": -1}):
        ask = client.ask("hub/echo", Look(), timeout=5, **odd)
        assert reason_of(ask) is FaultReason.TOO_LARGE
    assert client.ask("hub/echo", Look(text="fine"), timeout=5).result() == Answer(text="fine")


def test_a_callback_that_raises_does_not_hurt_the_node(bus: Bus) -> None:
    class Broken(Echo):
        def handle(self, delivery: Delivery) -> None:
            raise RuntimeError("broken")

    def broken(_: object) -> None:
        raise RuntimeError("broken")

    client = bus.leaf("client-a", on_link=broken)
    bus.hub.attach("broken", Broken())
    bus.hub.attach("echo", Echo())
    assert reason_of(client.ask("hub/broken", Look(), timeout=5)) is FaultReason.FAILED
    client.ask("hub/echo", Look(), timeout=5, on_end=broken).result()
    assert client.ask("hub/echo", Look(text="x"), timeout=5).result() == Answer(text="x")
    assert client.counters["callbacks_raised"] == 2
    assert bus.hub.counters["callbacks_raised"] == 1


def test_a_deadline_in_the_far_future_does_not_hurt_the_hub(bus: Bus) -> None:
    client, run = bus.leaf("client-a"), bus.leaf("run-1", Right.WORK)
    mute = Mute()
    run.attach("mute", mute)
    bus.hub.attach("echo", Echo())
    client.ask("run-1/mute", Look(), timeout=1e11)
    mute.wait_for(1)
    assert client.ask("hub/echo", Look(text="x"), timeout=5).result() == Answer(text="x")


def test_a_message_for_another_generation_is_stale(bus: Bus) -> None:
    run = bus.leaf("run-1", Right.WORK, generation=2)
    run.attach("echo", Echo())
    old = bus.hub.ask("run-1/echo", Work(), timeout=5, generation=1)
    assert reason_of(old) is FaultReason.STALE
    assert isinstance(bus.hub.ask("run-1/echo", Work(), timeout=5, generation=2).wait(), Answer)


def test_closing_a_node_ends_its_asks(bus: Bus) -> None:
    client = bus.leaf("client-a")
    mute = Mute()
    bus.hub.attach("mute", mute)
    ask = client.ask("hub/mute", Look(), timeout=30)
    mute.wait_for(1)
    client.close()
    client.close()
    assert reason_of(ask) is FaultReason.CLOSED
    assert reason_of(client.ask("hub/mute", Look(), timeout=30)) is FaultReason.CLOSED
    ended = Signal()
    client.ask("client-a/x", Look(), timeout=30, on_end=ended)
    (local,) = ended.wait(lambda seen: len(seen) == 1)
    assert reason_of(local) is FaultReason.CLOSED
    with pytest.raises(BusError):
        local.result()


def test_a_repeated_command_gets_the_first_ones_reply() -> None:
    store = ReplyStore(limit=2, ttl=10.0)
    replies = Signal()

    def delivery(key: str) -> Delivery:
        made = Delivery("x", "y", Change(), 0.0, lambda reply, _: replies(reply))
        made.key = key
        return made

    assert store.begin("a", delivery("a"), 0.0)
    assert not store.begin("a", delivery("a"), 0.0)
    assert store.begin("b", delivery("b"), 0.0)
    assert not store.begin("a", delivery("a"), 0.0), "a full store still knows its own"
    store.finish("a", Answer(text="done"), ())
    assert replies.seen == [Answer(text="done")] * 2
    assert not store.begin("a", delivery("a"), 1.0)
    assert store.begin("a", delivery("a"), 11.0), "forgotten after its time"
