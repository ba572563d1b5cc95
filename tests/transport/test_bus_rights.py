"""Who may say what to whom, and what becomes of those who lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from raw_dealer import RawDealer
from transport_kit import Answer, Bus, Change, Echo, Look, Mute, Signal, Work

from voidbus.transport.access import ipc_endpoints, secure_directory
from voidbus.transport.admission import token_digest
from voidbus.transport.control import Hello
from voidbus.transport.envelope import ATTACHMENT_LIMIT, Envelope, Kind, read_envelope
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.hub import Hub
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Message, Right


def outcome(node: Any, dest: str, message: Message) -> object:
    answer = node.ask(dest, message, timeout=5).wait()
    return answer.reason if isinstance(answer, Fault) else type(answer)


def test_a_link_may_only_send_what_its_endpoint_allows(bus: Bus) -> None:
    bus.hub.attach("echo", Echo())
    allowed: dict[Right, set[type[Message]]] = {
        Right.OBSERVE: {Look},
        Right.OPERATE: {Look, Change},
        Right.WORK: {Work},
    }
    for right, types in allowed.items():
        name = "run-1" if right is Right.WORK else f"client-{right.name}"
        leaf = bus.leaf(name, right)
        messages: list[Message] = [Look(), Change(), Work()]
        for message in messages:
            expected = Answer if type(message) in types else FaultReason.REFUSED
            assert outcome(leaf, "hub/echo", message) is expected


def test_a_run_may_not_address_another_run(bus: Bus) -> None:
    run, other = bus.leaf("run-1", Right.WORK), bus.leaf("run-2", Right.WORK)
    echo = Echo()
    other.attach("echo", echo)
    assert outcome(run, "run-2/echo", Work()) is FaultReason.REFUSED
    assert not echo.got


@pytest.mark.parametrize(
    ("name", "token", "generation"),
    [("run-1", "guess", 2), ("run-1", "right", 1), ("run-2", "right", 2), ("hub", "right", 2)],
)
def test_a_run_that_is_not_expected_is_refused_for_good(
    bus: Bus, name: str, token: str, generation: int
) -> None:
    bus.hub.expect("run-1", token_digest("right"), 2)
    refusals = Signal()
    leaf = bus.leaf(
        name, Right.WORK, wait=False, token=token, generation=generation, on_refused=refusals
    )
    assert not leaf.wait_up(5)
    assert leaf.refused
    assert token not in leaf.refused.split()
    assert refusals.wait(lambda seen: len(seen) == 1) == [leaf.refused]
    assert bus.hub.nodes == []


def test_a_client_may_not_take_a_runs_name_or_another_clients(bus: Bus) -> None:
    bus.leaf("client-a")
    for name in ("run-1", "client-a"):
        leaf = bus.leaf(name, wait=False)
        assert not leaf.wait_up(5)
        assert leaf.refused


def test_a_new_generation_fences_off_the_old_one(bus: Bus) -> None:
    run = bus.leaf("run-1", Right.WORK, generation=1)
    mute = Mute()
    run.attach("mute", mute)
    ask = bus.hub.ask("run-1/mute", Work(), timeout=30)
    mute.wait_for(1)
    bus.hub.expect("run-1", token_digest("token"), 2)
    fault = ask.wait()
    assert isinstance(fault, Fault)
    assert fault.reason is FaultReason.LINK_LOST
    bus.left.wait(lambda seen: seen == ["run-1"])


def test_an_operators_ask_ends_at_once_when_its_run_goes(bus: Bus) -> None:
    client, run = bus.leaf("client-a"), bus.leaf("run-1", Right.WORK)
    mute = Mute()
    run.attach("mute", mute)
    ask = client.ask("run-1/mute", Look(), timeout=30)
    mute.wait_for(1)
    run.close()
    fault = ask.wait()
    assert isinstance(fault, Fault)
    assert fault.reason is FaultReason.LINK_LOST


@pytest.fixture
def raw(wire_bus: Bus) -> Any:
    raw = RawDealer(wire_bus, Right.OPERATE)
    yield raw
    raw.socket.close()


def test_a_forged_sender_or_origin_is_dropped_and_counted(wire_bus: Bus, raw: RawDealer) -> None:
    echo = Echo()
    wire_bus.hub.attach("echo", echo)
    assert raw.hello("client-raw", 7) is Kind.WELCOME
    raw.ask("client-b/", "hub/echo", 7, 1)
    raw.ask("client-raw/", "hub/echo", 8, 2)
    raw.ask("client-raw/", "hub/echo", 7, 3)
    assert read_envelope(raw.socket.recv_multipart()).kind is Kind.REPLY
    assert len(echo.got) == 1
    assert wire_bus.hub.counters["forged_sender"] == 2


def test_a_connection_keeps_its_one_name(wire_bus: Bus, raw: RawDealer) -> None:
    wire_bus.hub.attach("echo", Echo())
    assert raw.hello("client-raw", 7) is Kind.WELCOME
    body = Hello(node="client-two", instance=9).to_json()
    raw.send(Envelope(Kind.HELLO, "hub/", "client-two/", tag=Hello.tag, body=body))
    raw.ask("client-raw/", "hub/echo", 7, 1)
    assert read_envelope(raw.socket.recv_multipart()).kind is Kind.REPLY
    assert wire_bus.hub.nodes == ["client-raw"]


def test_knowing_a_clients_instance_is_not_enough_to_take_its_link(
    wire_bus: Bus, raw: RawDealer
) -> None:
    client = wire_bus.leaf("client-a")
    assert raw.hello("client-a", client.instance) is Kind.REFUSED
    assert raw.hello("client-raw", wire_bus.hub.instance) is Kind.REFUSED


@pytest.mark.parametrize("right", list(Right))
def test_hostile_frames_are_counted_and_leave_the_hub_unharmed(wire_bus: Bus, right: Right) -> None:
    wire_bus.hub.attach("echo", Echo())
    client = wire_bus.leaf("client-a")
    raw = RawDealer(wire_bus, right)
    asked = Envelope(Kind.ASK, "hub/echo", "x/", tag=Look.tag, body=b"{}", deadline=1e9)
    good = asked.frames()[0]
    start = good.index(b"\0") + 1
    hostile = [
        [b""],
        [b"junk"] * 2,
        [b"\xff" * 10] * 3,
        [b"x"] * 5000,
        [b"x" * 3000 + good],
        [good[: start + 10]],
        [good[: start + 2] + b"\x09" + good[start + 3 :]],
        [good[: start + 3] + b"\xee" + good[start + 4 :]],
        [good, *[b""] * 17],
    ]
    for frames in hostile:
        raw.socket.send_multipart(frames)
    raw.send(Envelope(Kind.HELLO, "hub/", "x/", tag=Hello.tag, body=b"\xff{"))
    raw.send(Envelope(Kind.PING, "hub/", "x/"))  # answered: everything before it was read
    assert read_envelope(raw.socket.recv_multipart()).kind is Kind.UNKNOWN_LINK
    raw.socket.close()
    assert wire_bus.hub.counters["malformed"] == len(hostile) + 1
    assert client.ask("hub/echo", Look(text="x"), timeout=5).result() == Answer(text="x")


class Private(Message, tag="test.private"):
    """Has no right: sent inside a process only."""


@pytest.mark.parametrize("right", list(Right))
def test_no_link_may_send_what_is_private_to_a_process(wire_bus: Bus, right: Right) -> None:
    wire_bus.hub.attach("echo", Echo())
    name = "run-1" if right is Right.WORK else "client-a"
    leaf = wire_bus.leaf(name, right)
    outcome = leaf.ask("hub/echo", Private(), timeout=5).wait()
    assert isinstance(outcome, Fault)
    assert outcome.reason is FaultReason.REFUSED


def test_a_hub_that_is_still_reading_whom_to_expect_refuses_nobody(tmp_path: Path) -> None:
    endpoints = ipc_endpoints(secure_directory(tmp_path / "bus"))
    hub = Hub("hub", endpoints, hold_work=True)
    leaf = Leaf("run-1", hub.addresses[Right.WORK], token="t", generation=3)
    stranger = Leaf("run-2", hub.addresses[Right.WORK], token="t", generation=3)
    try:
        assert not leaf.wait_up(0.3)
        assert leaf.refused == ""
        hub.expect("run-1", token_digest("t"), 3)
        hub.open_work()
        assert leaf.wait_up(5)
        assert not stranger.wait_up(5)
        assert "not expected" in stranger.refused
    finally:
        leaf.close()
        stranger.close()
        hub.close()


@pytest.mark.parametrize("right", list(Right))
def test_a_frame_over_the_limit_costs_its_sender_the_connection_and_nobody_else(
    wire_bus: Bus, right: Right
) -> None:
    wire_bus.hub.attach("echo", Echo())
    client = wire_bus.leaf("client-a")
    raw = RawDealer(wire_bus, right)
    raw.send(Envelope(Kind.PING, "hub/", "x/"))
    assert read_envelope(raw.socket.recv_multipart()).kind is Kind.UNKNOWN_LINK
    raw.socket.send(b"x" * (ATTACHMENT_LIMIT + 1))
    for _ in range(3):
        answer = client.ask("hub/echo", Look(text="after"), timeout=5).result()
        assert answer == Answer(text="after")
    raw.socket.close()


def test_a_reply_from_a_node_that_was_not_asked_is_dropped(wire_bus: Bus) -> None:
    asked, liar = wire_bus.leaf("run-1", Right.WORK), RawDealer(wire_bus, Right.WORK)
    mute = Mute()
    asked.attach("mute", mute)
    wire_bus.hub.expect("run-2", token_digest("raw"), 0)
    assert liar.hello("run-2", 9) is Kind.WELCOME
    ask = wire_bus.hub.ask("run-1/mute", Work(), timeout=0.5)
    mute.wait_for(1)
    body = Answer(text="a lie").to_json()
    for number in range(1, 20):  # the numbers of asks are no secret: they are counted
        liar.send(
            Envelope(
                Kind.REPLY,
                "hub/",
                "run-2/x",
                origin=wire_bus.hub.instance,
                sequence=number,
                tag=Answer.tag,
                body=body,
            )
        )
    outcome = ask.wait()
    assert isinstance(outcome, Fault)
    assert outcome.reason is FaultReason.EXPIRED
    assert wire_bus.hub.counters["late_replies"] == 19
    liar.socket.close()
