"""Actors that drive their node's sockets while they wait, asked by another node."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transport_kit import Answer, Bus, Look, Work

from voidbus.actors.runtime.actor import Actor, Place, handles
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.leaf import Leaf
from voidbus.transport.message import Right

PATIENCE = 20.0


class Teller(Actor):
    """Answers with the words it was told; asked for `stuck`, only when it is let go."""

    mailbox_limit = 10_000

    def __init__(self, place: Place, let_go: threading.Event) -> None:
        super().__init__(place)
        self._let_go = let_go
        self.words: list[str] = []
        self.ticks = 0

    @handles(Look)
    def on_look(self, message: Look, delivery: Delivery) -> None:
        self.words.append(message.text)

    @handles(Work)
    def on_work(self, message: Work, delivery: Delivery) -> Answer:
        if message.text == "stuck":
            self._let_go.wait(PATIENCE)
        if message.text == "tick":
            self.after(0.0, self._tick)
        return Answer(text=" ".join(self.words))

    def _tick(self) -> None:
        self.ticks += 1


class Linked:
    """A hub here, and a leaf with a system of two actors."""

    def __init__(self, directory: Path) -> None:
        self.bus = Bus("ipc", directory)
        self.leaf: Leaf = self.bus.leaf("run-1", Right.WORK)
        self.system = System(self.leaf)
        self.let_go = threading.Event()
        self.teller = self.system.start(Teller, "teller", self.let_go)
        self.system.start(Teller, "other", self.let_go)

    def ask(self, text: str = "", timeout: float = PATIENCE) -> str:
        """Ask the teller from afar."""
        reply = self.bus.hub.ask("run-1/teller", Work(text=text), timeout=timeout).result()
        assert isinstance(reply, Answer)
        return reply.text

    def close(self) -> None:
        self.let_go.set()
        self.system.stop(PATIENCE)
        self.bus.close()


@pytest.fixture
def linked(tmp_path: Path) -> Iterator[Linked]:
    linked = Linked(tmp_path)
    try:
        yield linked
    finally:
        linked.close()


def test_an_actor_that_drives_is_woken_by_its_own_process(linked: Linked) -> None:
    for number in range(300):
        linked.ask()  # it waits for the next one now, at the sockets
        reply = linked.leaf.ask("run-1/teller", Work(), timeout=PATIENCE).result()
        assert isinstance(reply, Answer), number


def test_what_is_told_from_both_sides_is_handled_and_kept_in_order(linked: Linked) -> None:
    def tell() -> None:
        for number in range(300):
            linked.leaf.tell("run-1/teller", Look(text=f"here-{number}"))

    thread = threading.Thread(target=tell)
    thread.start()
    for number in range(300):
        linked.bus.hub.tell("run-1/teller", Look(text=f"there-{number}"))
        linked.ask()
    thread.join(PATIENCE)
    words = linked.ask().split()
    for side in ("here", "there"):
        mine = [word for word in words if word.startswith(side)]
        assert mine == [f"{side}-{number}" for number in range(300)]


def test_an_actor_that_is_busy_leaves_the_sockets_to_its_node(linked: Linked) -> None:
    for _ in range(50):
        linked.ask()
    stuck = linked.bus.hub.ask("run-1/teller", Work(text="stuck"), timeout=PATIENCE)
    for _ in range(50):  # all of these pass the node of the one that is stuck
        reply = linked.bus.hub.ask("run-1/other", Work(), timeout=PATIENCE).result()
        assert isinstance(reply, Answer)
    assert not stuck.ended
    linked.let_go.set()
    assert isinstance(stuck.result(), Answer)


def test_timers_of_an_actor_that_drives_are_run(linked: Linked) -> None:
    for number in range(1, 100):
        linked.ask("tick")
        linked.ask()
        assert linked.teller.ticks == number


def test_a_system_stops_while_one_of_its_actors_drives(linked: Linked) -> None:
    for _ in range(50):
        linked.ask()
    assert linked.system.stop(PATIENCE)
    outcome = linked.bus.hub.ask("run-1/teller", Work(), timeout=PATIENCE).wait()
    assert isinstance(outcome, Fault)
    assert outcome.reason is FaultReason.NO_SUCH_ACTOR
