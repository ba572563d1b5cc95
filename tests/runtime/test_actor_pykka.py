"""pykka's own references and proxies on our actors, and asks that race with stops."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import actor_kit as kit
import pykka
import pytest

from voidbus.actors.runtime.actor import LATER, Actor, Place, handles
from voidbus.actors.runtime.mailbox import Overflow
from voidbus.actors.runtime.policy import ExitReason
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import BusError, Fault, FaultReason


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


class Adder(Actor):
    """For pykka's callers and for the bus's."""

    mailbox_limit = 100_000

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self.total = 0
        self.stopped = False

    def on_receive(self, message: Any) -> Any:
        if isinstance(message, BaseException):
            raise message
        self.total += message
        return self.total

    def add(self, number: int) -> int:
        self.total += number
        return self.total

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> kit.Answer:
        return kit.Answer(word=str(message.number))

    def on_stop(self) -> None:
        self.stopped = True


class Tiny(Adder):
    mailbox_limit = 1


class Shedding(Adder):
    mailbox_limit = 1
    overflow = Overflow.DROP_OLDEST


def block(actor: Actor) -> threading.Event:
    """Keep the actor busy until the event is set."""
    busy, let_go = threading.Event(), threading.Event()

    def wait() -> None:
        busy.set()
        assert let_go.wait(kit.PATIENCE)

    actor.post(wait)
    assert busy.wait(kit.PATIENCE)
    return let_go


def test_ask_and_tell_of_a_pykka_reference_reach_on_receive(system: System) -> None:
    ref = system.start(Adder, "adder").actor_ref
    ref.tell(2)
    assert ref.ask(3, timeout=kit.PATIENCE) == 5
    assert ref.is_alive()


def test_a_pykka_proxy_calls_reads_and_writes(system: System) -> None:
    proxy: Any = system.start(Adder, "adder").actor_ref.proxy()
    assert proxy.add(4).get(timeout=kit.PATIENCE) == 4
    proxy.total = 10
    assert proxy.total.get(timeout=kit.PATIENCE) == 10


def test_pykkas_registry_knows_the_living(system: System) -> None:
    ref = system.start(Adder, "adder").actor_ref
    assert pykka.ActorRegistry.get_by_class(Adder) == [ref]
    ref.stop(timeout=kit.PATIENCE)
    assert pykka.ActorRegistry.get_by_class(Adder) == []


def test_what_was_asked_before_a_stop_is_answered_and_after_it_is_not(system: System) -> None:
    actor = system.start(Adder, "adder")
    ref, let_go = actor.actor_ref, block(actor)
    before = ref.ask(1, block=False)
    stop = ref.stop(block=False)
    after = ref.ask(2, block=False)
    let_go.set()
    assert before.get(timeout=kit.PATIENCE) == 1
    assert stop.get(timeout=kit.PATIENCE) is True
    with pytest.raises(pykka.ActorDeadError):
        after.get(timeout=kit.PATIENCE)


def test_a_stop_is_answered_when_on_stop_has_run(system: System) -> None:
    actor = system.start(Adder, "adder")
    assert actor.actor_ref.stop(timeout=kit.PATIENCE) is True
    assert actor.stopped
    assert not actor.actor_ref.is_alive()
    assert actor.actor_ref.stop(timeout=kit.PATIENCE) is False


def test_several_stops_at_once_are_all_answered(system: System) -> None:
    actor = system.start(Adder, "adder")
    let_go = block(actor)
    stops = [actor.actor_ref.stop(block=False) for _ in range(5)]
    let_go.set()
    assert [stop.get(timeout=kit.PATIENCE) for stop in stops] == [True] * 5


def test_an_actor_may_stop_itself_as_pykkas_do(system: System) -> None:
    actor = system.start(Adder, "adder")
    actor.stop()
    assert actor.join(kit.PATIENCE)
    with pytest.raises(pykka.ActorDeadError):
        actor.actor_ref.tell(1)


def test_an_exception_goes_to_a_pykka_asker_and_the_actor_lives(system: System) -> None:
    ref = system.start(Adder, "adder").actor_ref
    with pytest.raises(ValueError, match="bad"):
        ref.ask(ValueError("bad"), timeout=kit.PATIENCE)
    assert ref.ask(1, timeout=kit.PATIENCE) == 1


def test_an_exception_of_a_pykka_tell_ends_the_actor(system: System) -> None:
    ends: list[ExitReason] = []
    actor = system.start(Adder, "adder", on_end=ends.append)
    actor.actor_ref.tell(ValueError("bad"))
    assert actor.join(kit.PATIENCE)
    assert ends[0].detail == "ValueError: bad"


@pytest.mark.parametrize("error", [SystemExit("out"), KeyboardInterrupt()])
def test_a_base_exception_ends_that_actor_and_not_its_asker_or_the_others(
    system: System, error: BaseException
) -> None:
    """pykka stops all actors, and leaves the asker waiting."""
    other = system.start(Adder, "other").actor_ref
    actor = system.start(Adder, "adder")
    with pytest.raises(pykka.ActorDeadError):
        actor.actor_ref.ask(error, timeout=kit.PATIENCE)
    assert actor.join(kit.PATIENCE)
    assert other.ask(1, timeout=kit.PATIENCE) == 1


def test_a_full_mailbox_is_told_to_pykkas_callers_and_a_stop_is_still_taken(
    system: System,
) -> None:
    actor = system.start(Tiny, "tiny")
    ref, let_go = actor.actor_ref, block(actor)
    ref.tell(1)
    with pytest.raises(BusError, match="mailbox is full"):
        ref.tell(2)
    with pytest.raises(BusError, match="mailbox is full"):
        ref.ask(2, timeout=kit.PATIENCE)
    stop = ref.stop(block=False)
    let_go.set()
    assert stop.get(timeout=kit.PATIENCE) is True


def test_a_shed_pykka_ask_ends_and_a_stop_is_never_shed(system: System) -> None:
    actor = system.start(Shedding, "shedding")
    ref, let_go = actor.actor_ref, block(actor)
    first = ref.ask(1, block=False)
    stop = ref.stop(block=False)
    second = ref.ask(2, block=False)
    with pytest.raises(BusError, match="mailbox is full"):
        first.get(timeout=kit.PATIENCE)
    let_go.set()
    assert stop.get(timeout=kit.PATIENCE) is True
    with pytest.raises(pykka.ActorDeadError):
        second.get(timeout=kit.PATIENCE)


def test_no_pykka_ask_is_lost_when_it_races_with_a_stop(system: System) -> None:
    """pykka's own queue takes an ask after its actor's end and never answers it."""
    answered = dead = 0
    with kit.switching_every(1e-6):
        for round_ in range(40):
            actor = system.start(Adder, f"adder{round_}")
            ref = actor.actor_ref
            futures: list[list[pykka.Future[int]]] = [[], []]

            def ask_many(mine: list[pykka.Future[int]], ref: pykka.ActorRef[Adder] = ref) -> None:
                for _ in range(250):
                    mine.append(ref.ask(1, block=False))  # noqa: PERF401 - one by one is the point

            threads = [threading.Thread(target=ask_many, args=[mine]) for mine in futures]
            for thread in threads:
                thread.start()
            actor.actor_ref.stop(timeout=kit.PATIENCE)
            for thread in threads:
                thread.join(kit.PATIENCE)
            for future in (*futures[0], *futures[1]):
                try:
                    future.get(timeout=kit.PATIENCE)
                    answered += 1
                except pykka.ActorDeadError:
                    dead += 1
    assert answered + dead == 40 * 500


class Holder(Adder):
    """Answers every other message later, which may be never."""

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> Any:
        return LATER if message.number % 2 else kit.Answer(word=str(message.number))


@pytest.mark.parametrize("kind", [Adder, Holder])
def test_no_ask_of_the_bus_is_lost_when_it_races_with_a_stop(
    system: System, kind: type[Adder]
) -> None:
    """20,000 asks all end, and long before their deadline."""
    rounds, each = 40, 250
    reasons: set[FaultReason] = set()
    with kit.switching_every(1e-6):
        for round_ in range(rounds):
            actor = system.start(kind, f"adder{round_}")
            asks: list[list[Any]] = [[], []]

            def ask_many(mine: list[Any], path: str = actor.path) -> None:
                for number in range(each):
                    mine.append(  # noqa: PERF401 - one by one is the point
                        kit.ask(system, path, kit.Say(number=number), timeout=600.0)
                    )

            threads = [threading.Thread(target=ask_many, args=[mine]) for mine in asks]
            for thread in threads:
                thread.start()
            actor.request_stop(1.0)
            for thread in threads:
                thread.join(kit.PATIENCE)
            assert actor.join(kit.PATIENCE)
            for one in (*asks[0], *asks[1]):
                assert one.ended, "an ask was lost"
                if isinstance(one.outcome, Fault):
                    reasons.add(one.outcome.reason)
    assert reasons <= {
        FaultReason.MAILBOX_CLOSED,
        FaultReason.NO_SUCH_ACTOR,
        FaultReason.FAILED,
    }
