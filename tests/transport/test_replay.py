"""At most once: what bears a number its session has used is dropped and counted."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_dealer import RawDealer, look
from transport_kit import Bus, Echo, Look, Mute

from voidbus.transport.envelope import Envelope, Kind
from voidbus.transport.message import Right
from voidbus.transport.replay import WINDOW, EndedSessions, ReplayWindow

NAME, INSTANCE = "client-raw", 7


# -- the window ------------------------------------------------------------------------------

# Steps about as wide as the window and its edges, and numbers a hostile peer would choose.
steps = st.integers(-WINDOW - 2, WINDOW + 2) | st.integers(-3, 3)
jumps = st.integers(0, 2**64 - 1)


@given(st.lists(st.tuples(st.booleans(), steps, jumps), max_size=60))
def test_a_number_is_taken_once_and_never_from_before_the_window(
    moves: list[tuple[bool, int, int]],
) -> None:
    window, used, highest = ReplayWindow(), set[int](), 0
    for walks, step, jump in moves:
        number = min(max(highest + step, 0), 2**64 - 1) if walks else jump
        expected = number not in used and number > highest - WINDOW
        assert window.take(number) is expected, (number, highest)
        if expected:
            used.add(number)
            highest = max(highest, number)


def test_numbers_out_of_their_order_are_all_taken_once() -> None:
    window = ReplayWindow()
    numbers = [*range(WINDOW, 0, -1)]
    assert all(window.take(number) for number in numbers)
    assert not any(window.take(number) for number in numbers)
    assert window.take(WINDOW + 1)
    assert not window.take(1)


def test_sessions_that_ended_are_known_again_while_there_is_room() -> None:
    ended = EndedSessions(limit=2)
    for instance in range(3):
        window = ended.resume("client-a", instance)
        assert window.take(1)
        ended.keep("client-a", instance, window)
    assert ended.resume("client-a", 0).take(1), "forgotten for the two that came after it"
    assert not ended.resume("client-a", 2).take(1)
    assert ended.resume("client-b", 1).take(1), "another node's session"


# -- a hub -----------------------------------------------------------------------------------


@pytest.fixture
def raw(wire_bus: Bus) -> Iterator[RawDealer]:
    raw = RawDealer(wire_bus, Right.OPERATE)
    yield raw
    raw.socket.close()


@pytest.fixture
def receivers(wire_bus: Bus) -> dict[str, Echo]:
    """Who answers at an address here, and at one that is forwarded."""
    receivers = {"hub/echo": Echo(), "run-1/echo": Echo()}
    wire_bus.hub.attach("echo", receivers["hub/echo"])
    wire_bus.leaf("run-1", Right.WORK).attach("echo", receivers["run-1/echo"])
    return receivers


def frame(kind: Kind, dest: str, number: int) -> Envelope:
    return look(kind, f"{NAME}/", dest, INSTANCE, number)


def settle(raw: RawDealer, dest: str, number: int) -> None:
    """All that was sent to `dest` before has arrived, or never will: it answers in order."""
    raw.send(frame(Kind.ASK, dest, number))
    while (answer := raw.receive()).sequence != number:
        pass
    assert answer.kind is Kind.REPLY


@pytest.mark.parametrize("dest", ["hub/echo", "run-1/echo"])
@pytest.mark.parametrize("kind", [Kind.ASK, Kind.TELL])
def test_a_message_replayed_after_it_was_handled_is_dropped_and_counted(
    wire_bus: Bus, raw: RawDealer, receivers: dict[str, Echo], kind: Kind, dest: str
) -> None:
    assert raw.hello(NAME, INSTANCE) is Kind.WELCOME
    raw.send(frame(kind, dest, 1))
    receivers[dest].wait_for(1)
    if kind is Kind.ASK:
        assert raw.receive().kind is Kind.REPLY
    for _ in range(2):
        raw.send(frame(kind, dest, 1))
    settle(raw, dest, 2)
    assert len(receivers[dest].got) == 2, "the message, and the ask that settled it"
    assert wire_bus.hub.counters["replayed"] == 2


@pytest.mark.parametrize("dest", ["hub/mute", "run-1/mute"])
def test_an_ask_replayed_while_it_is_under_way_is_dropped_and_counted(
    wire_bus: Bus, raw: RawDealer, dest: str
) -> None:
    mute = Mute()
    wire_bus.hub.attach("mute", mute)
    wire_bus.hub.attach("echo", Echo())
    wire_bus.leaf("run-1", Right.WORK).attach("mute", mute)
    assert raw.hello(NAME, INSTANCE) is Kind.WELCOME
    for number in (1, 1, 2):
        raw.send(frame(Kind.ASK, dest, number))
    settle(raw, "hub/echo", 3)
    assert len(mute.wait_for(2)) == 2
    assert wire_bus.hub.counters["replayed"] == 1


def test_messages_a_little_out_of_their_order_are_handled(
    wire_bus: Bus, raw: RawDealer, receivers: dict[str, Echo]
) -> None:
    assert raw.hello(NAME, INSTANCE) is Kind.WELCOME
    for number in (3, 1, 2):
        raw.send(frame(Kind.TELL, "hub/echo", number))
    settle(raw, "hub/echo", 4)
    assert len(receivers["hub/echo"].got) == 4
    assert wire_bus.hub.counters["replayed"] == 0


@pytest.mark.parametrize("parts", [False, True])
def test_a_session_that_says_hello_again_may_repeat_nothing(
    wire_bus: Bus, raw: RawDealer, receivers: dict[str, Echo], parts: bool
) -> None:
    assert raw.hello(NAME, INSTANCE) is Kind.WELCOME
    settle(raw, "hub/echo", 1)
    if parts:
        raw.send(Envelope(Kind.BYE, "hub/", f"{NAME}/"))
        wire_bus.left.wait(lambda seen: seen == [NAME])
    assert raw.hello(NAME, INSTANCE) is Kind.WELCOME
    raw.send(frame(Kind.ASK, "hub/echo", 1))
    settle(raw, "hub/echo", 2)
    assert len(receivers["hub/echo"].got) == 2
    assert wire_bus.hub.counters["replayed"] == 1


def test_another_session_of_the_same_name_numbers_anew(
    wire_bus: Bus, raw: RawDealer, receivers: dict[str, Echo]
) -> None:
    assert raw.hello(NAME, INSTANCE) is Kind.WELCOME
    settle(raw, "hub/echo", 1)
    raw.send(Envelope(Kind.BYE, "hub/", f"{NAME}/"))
    assert raw.hello(NAME, INSTANCE + 1) is Kind.WELCOME
    raw.send(look(Kind.ASK, f"{NAME}/", "hub/echo", INSTANCE + 1, 1))
    assert raw.receive().kind is Kind.REPLY
    assert len(receivers["hub/echo"].got) == 2
    assert wire_bus.hub.counters["replayed"] == 0


# -- a leaf ----------------------------------------------------------------------------------


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads change as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
def test_numbers_leave_in_their_order_whichever_threads_send(ipc_bus: Bus) -> None:
    client, mute = ipc_bus.leaf("client-a"), Mute()
    ipc_bus.hub.attach("mute", mute)
    left: list[int] = []
    submit = client._loop.submit

    def record(envelope: Envelope) -> object:
        left.append(envelope.sequence)
        return submit(envelope)

    client._loop.submit = record  # type: ignore[method-assign, assignment]

    def send() -> None:
        for _ in range(300):
            assert client.tell("hub/mute", Look()) is None
            client.ask("hub/mute", Look(), timeout=60)

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == sorted(left)
    mute.wait_for(len(left), timeout=20)
    assert ipc_bus.hub.counters["replayed"] == 0
