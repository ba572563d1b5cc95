"""Liveness: an actor that is at one message for too long is seen, said once, and seen to go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from functools import partial

import actor_kit as kit
import pytest

from voidbus.actors.messages.actor import (
    ActorStuck,
    ActorWentOn,
    InspectSystem,
    SystemStatus,
    liveness_topic,
)
from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.liveness import name_of
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.message import Message
from voidbus.transport.topics import Publication

# What counts as too long here (seconds): long for a handler that only takes a note.
STUCK_AFTER = 0.15


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system(stuck_after=STUCK_AFTER) as made:
        yield made


class Heard:
    """What is published about the liveness of a system's actors."""

    def __init__(self, system: System) -> None:
        self._changed = threading.Condition()
        self.messages: list[Message] = []
        topic = liveness_topic(system.node.name)
        assert system.node.subscribe(topic, self._take).wait_ready(kit.PATIENCE)

    def _take(self, publication: Publication) -> None:
        with self._changed:
            self.messages.append(publication.message)
            self._changed.notify_all()

    def wait(self, number: int) -> list[Message]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.messages) >= number, kit.PATIENCE)
            return list(self.messages)


def statuses(system: System) -> dict[str, tuple[str, str]]:
    found = kit.reply(kit.ask(system, "system", InspectSystem()), SystemStatus)
    return {actor.path: (actor.state, actor.handler) for actor in found.actors}


def test_an_actor_stuck_in_a_handler_is_shown_logged_and_published_once(
    system: System, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    heard = Heard(system)
    system.start(kit.Echo, "echo")
    gate = kit.blocked_gate(system, kit.Log())
    (stuck,) = heard.wait(1)
    assert isinstance(stuck, ActorStuck)
    assert (stuck.path, stuck.handler) == ("gate", "kit.crash")
    assert stuck.seconds >= STUCK_AFTER
    assert statuses(system) == {"echo": ("running", ""), "gate": ("stuck", "kit.crash")}
    gate.let_go.set()
    (_, went_on) = heard.wait(2)
    assert isinstance(went_on, ActorWentOn)
    assert (went_on.path, went_on.handler) == ("gate", "kit.crash")
    assert statuses(system)["gate"] == ("running", "")
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0] for text in said] == [
        "here/gate is stuck",
        "here/gate went on after kit.crash",
    ]
    assert "on_block" in said[0], "where it is stuck"


class Slow(Actor):
    """Blocks wherever it is told to."""

    mailbox_limit = 4

    def __init__(self, place: Place, where: str, let_go: threading.Event) -> None:
        super().__init__(place)
        self.where, self.let_go = where, let_go

    def block(self, where: str) -> None:
        if where == self.where:
            assert self.let_go.wait(kit.PATIENCE)

    def on_start(self) -> None:
        self.block("on_start")
        self.after(0.0, partial(self.block, "a timer"))

    def on_stop(self) -> None:
        self.block("on_stop")

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> None:
        self.post(partial(self.block, "a call"))


@pytest.mark.parametrize(
    ("where", "handler"),
    [
        ("on_start", "on_start"),
        ("a timer", "a timer"),
        ("on_stop", "on_stop"),
        ("a call", "Slow.block"),
    ],
)
def test_an_actor_is_seen_to_be_stuck_wherever_it_is(
    system: System, where: str, handler: str
) -> None:
    heard, let_go = Heard(system), threading.Event()
    slow = system.start(Slow, "slow", where, let_go)
    if where == "a call":
        system.node.tell("here/slow", kit.Say())
    if where == "on_stop":
        slow.request_stop(kit.PATIENCE)
    (stuck,) = heard.wait(1)
    let_go.set()
    assert isinstance(stuck, ActorStuck)
    assert (stuck.path, stuck.handler) == ("slow", handler)


def test_actors_that_take_their_messages_are_never_said_to_be_stuck(system: System) -> None:
    heard = Heard(system)
    gates = [kit.blocked_gate(system, kit.Log())]
    system.start(kit.Echo, "echo")
    for number in range(1000):
        kit.reply(kit.ask(system, "echo", kit.Say(number=number)), kit.Answer)
    heard.wait(1)
    gates[0].let_go.set()
    assert {getattr(message, "path", "") for message in heard.wait(2)} == {"gate"}


def test_an_actor_that_ends_while_it_is_stuck_is_forgotten(system: System) -> None:
    heard = Heard(system)
    gate = kit.blocked_gate(system, kit.Log())
    heard.wait(1)
    gate.request_stop(kit.PATIENCE)
    gate.let_go.set()
    assert gate.join(kit.PATIENCE)
    kit.blocked_gate(system, kit.Log()).let_go.set()
    assert statuses(system) == {"gate": ("running", "")}


def is_armed(system: System) -> bool:
    return system.liveness.armed


def test_nothing_is_set_to_wake_a_process_in_which_nothing_happens(system: System) -> None:
    system.start(kit.Echo, "echo")
    kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)
    assert is_armed(system)
    checked = threading.Event()
    check = system.liveness._check

    def observed() -> None:
        check()
        checked.set()

    system.liveness._check = observed  # type: ignore[method-assign]
    system.liveness.arm()
    assert checked.wait(kit.PATIENCE)
    assert not is_armed(system)
    assert system.node.next_timer() is None


def test_what_an_actor_is_at_has_a_name() -> None:
    def call() -> None: ...

    assert name_of(kit.delivery(kit.Say())) == "kit.say"
    assert name_of(partial(partial(call))).endswith("call")
    assert name_of("on_start") == "on_start"
    assert name_of(object()) == "object"
