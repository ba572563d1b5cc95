"""Commands: a repeat gets the stored reply, and a fault is not stored."""

from __future__ import annotations

from collections.abc import Iterator

import actor_kit as kit
import pytest

from voidbus.actors.messages.actor import ActorStatus, Done, Inspect
from voidbus.actors.runtime.actor import LATER, Actor, Place, Refuse, handles
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import FaultReason


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


class Counter(Actor):
    """Counts the commands it carries out. "refuse" and "later" are special words."""

    mailbox_limit = 32

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.count = 0
        self.held: list[Delivery] = []

    @handles(kit.Change)
    def on_change(self, message: kit.Change, delivery: Delivery) -> object:
        self.count += 1
        if message.word == "refuse":
            raise Refuse("no")
        if message.word == "later":
            self.held.append(delivery)
            return LATER
        return kit.Answer(word=str(self.count))

    @handles(kit.Urgent)
    def on_urgent(self, message: kit.Urgent, delivery: Delivery) -> None:
        for held in self.held:
            if message.number:
                held.fail(FaultReason.FAILED, "it went wrong")
            else:
                held.reply(kit.Answer(word=f"after {self.count}"))


def test_the_repeat_of_a_command_gets_the_stored_reply(system: System) -> None:
    actor = system.start(Counter, "counter")
    for _ in range(3):
        answer = kit.reply(kit.ask(system, "counter", kit.Change(), key="k"), kit.Answer)
        assert answer.word == "1"
    other = kit.reply(kit.ask(system, "counter", kit.Change(), key="other"), kit.Answer)
    assert other.word == "2"
    assert actor.count == 2


def test_commands_without_a_key_are_each_carried_out(system: System) -> None:
    system.start(Counter, "counter")
    words = [kit.reply(kit.ask(system, "counter", kit.Change()), kit.Answer).word for _ in "ab"]
    assert words == ["1", "2"]


def test_repeats_while_the_command_is_under_way_get_its_reply(system: System) -> None:
    actor = system.start(Counter, "counter")
    asks = [kit.ask(system, "counter", kit.Change(word="later"), key="k") for _ in range(5)]
    kit.reply(kit.ask(system, "counter", kit.Urgent()), Done)
    assert [kit.reply(one, kit.Answer).word for one in asks] == ["after 1"] * 5
    assert actor.count == 1


def test_a_command_that_was_refused_may_be_tried_again(system: System) -> None:
    actor = system.start(Counter, "counter")
    for _ in range(2):
        refused = kit.ask(system, "counter", kit.Change(word="refuse"), key="k")
        assert kit.fault(refused) is FaultReason.REFUSED
    assert actor.count == 2
    assert kit.reply(kit.ask(system, "counter", kit.Change(), key="k"), kit.Answer).word == "3"


def test_repeats_of_a_command_that_fails_later_get_its_fault_and_it_may_be_tried_again(
    system: System,
) -> None:
    system.start(Counter, "counter")
    asks = [kit.ask(system, "counter", kit.Change(word="later"), key="k") for _ in range(3)]
    kit.reply(kit.ask(system, "counter", kit.Urgent(number=1)), Done)
    assert {kit.fault(one) for one in asks} == {FaultReason.FAILED}
    assert kit.reply(kit.ask(system, "counter", kit.Change(), key="k"), kit.Answer).word == "2"


def test_repeats_of_a_command_are_failed_when_its_actor_ends(system: System) -> None:
    actor = system.start(Counter, "counter")
    asks = [kit.ask(system, "counter", kit.Change(word="later"), key="k") for _ in range(3)]
    kit.reply(kit.ask(system, "counter", Inspect()), ActorStatus)
    actor.request_stop(1.0)
    assert {kit.fault(one) for one in asks} == {FaultReason.FAILED}
