"""Actors: handlers, faults, asks, and what happens to everybody when one ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import actor_kit as kit
import pytest

from voidbus.actors.messages.actor import ActorStatus, Done, Inspect
from voidbus.actors.runtime.actor import LATER, Actor, Place, Refuse, handles
from voidbus.actors.runtime.policy import ExitKind, ExitReason
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


# ---- handlers ------------------------------------------------------------------------------------


def test_a_message_is_handled_by_its_type(system: System) -> None:
    system.start(kit.Echo, "echo")
    assert kit.reply(kit.ask(system, "echo", kit.Say(word="hello")), kit.Answer).word == "hello"


def test_a_handler_that_returns_nothing_answers_done(system: System) -> None:
    class Quiet(Actor):
        mailbox_limit = 1

        @handles(kit.Say)
        def on_say(self, message: kit.Say, delivery: Delivery) -> None: ...

    system.start(Quiet, "quiet")
    kit.reply(kit.ask(system, "quiet", kit.Say()), Done)


def test_a_type_nobody_handles_is_a_typed_fault_and_the_actor_lives(system: System) -> None:
    system.start(kit.Echo, "echo")
    told = kit.reply(kit.ask(system, "echo", kit.Unknown()), Fault)
    assert told.reason is FaultReason.UNHANDLED
    assert "kit.unknown" in told.detail
    system.node.tell("here/echo", kit.Unknown())
    kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)
    assert system.node.counters["fault_unhandled"] == 2


def test_a_returned_tell_that_nobody_handles_harms_nothing(system: System) -> None:
    system.start(kit.Echo, "echo")
    back = Fault(reason=FaultReason.NO_SUCH_NODE, detail="gone", address="there/x")
    system.node.tell("here/echo", back)
    kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)


def test_a_subclass_inherits_handlers_and_its_override_is_called(system: System) -> None:
    class Louder(kit.Echo):
        def on_say(self, message: kit.Say, delivery: Delivery) -> object:
            return kit.Answer(word=message.word.upper())

        @handles(kit.Urgent)
        def on_urgent(self, message: kit.Urgent, delivery: Delivery) -> object:
            return kit.Answer(word="urgent")

    system.start(Louder, "louder")
    assert kit.reply(kit.ask(system, "louder", kit.Say(word="a")), kit.Answer).word == "A"
    assert kit.reply(kit.ask(system, "louder", kit.Urgent()), kit.Answer).word == "urgent"
    assert kit.fault(kit.ask(system, "louder", kit.Crash())) is FaultReason.FAILED


def test_a_subclass_may_handle_a_type_by_a_method_of_its_own_or_not_at_all(
    system: System,
) -> None:
    class Other(kit.Echo):
        on_crash = None  # type: ignore[assignment]

        @handles(kit.Say)
        def answer_otherwise(self, message: kit.Say, delivery: Delivery) -> object:
            return kit.Answer(word="otherwise")

    system.start(Other, "other")
    assert kit.reply(kit.ask(system, "other", kit.Say(word="a")), kit.Answer).word == "otherwise"
    assert kit.fault(kit.ask(system, "other", kit.Crash())) is FaultReason.UNHANDLED


def test_a_handler_may_refuse_and_goes_on(system: System) -> None:
    class Picky(Actor):
        mailbox_limit = 4

        @handles(kit.Say)
        def on_say(self, message: kit.Say, delivery: Delivery) -> None:
            raise Refuse("not today", FaultReason.OVERLOADED)

    system.start(Picky, "picky")
    for _ in range(2):
        told = kit.reply(kit.ask(system, "picky", kit.Say()), Fault)
        assert (told.reason, told.detail) == (FaultReason.OVERLOADED, "not today")


def test_a_handler_may_answer_later(system: System) -> None:
    class Slow(Actor):
        mailbox_limit = 4
        held: Delivery | None = None

        @handles(kit.Say)
        def on_say(self, message: kit.Say, delivery: Delivery) -> object:
            self.held = delivery
            return LATER

        @handles(kit.Urgent)
        def on_urgent(self, message: kit.Urgent, delivery: Delivery) -> None:
            assert self.held is not None
            self.held.reply(kit.Answer(word="at last"))

    system.start(Slow, "slow")
    held = kit.ask(system, "slow", kit.Say())
    kit.reply(kit.ask(system, "slow", kit.Urgent()), Done)
    assert kit.reply(held, kit.Answer).word == "at last"


def test_asks_that_were_to_be_answered_later_are_failed_when_the_actor_ends(
    system: System,
) -> None:
    class Never(kit.Echo):
        @handles(kit.Say)
        def on_say(self, message: kit.Say, delivery: Delivery) -> object:
            return LATER

    system.start(Never, "never")
    held = kit.ask(system, "never", kit.Say())
    kit.ask(system, "never", kit.Crash())
    assert kit.fault(held) is FaultReason.FAILED


def test_an_actor_without_a_mailbox_limit_can_not_be_made(system: System) -> None:
    class Unbounded(Actor):
        pass

    with pytest.raises(TypeError, match="Unbounded names no mailbox_limit"):
        system.start(Unbounded, "unbounded")
    assert system.find("unbounded") is None


@pytest.mark.parametrize(
    "kind", ["RuntimeError", "SystemExit", "KeyboardInterrupt", "GeneratorExit"]
)
def test_whatever_a_handler_raises_answers_failed_and_ends_that_actor_only(
    system: System, kind: str
) -> None:
    ends: list[ExitReason] = []
    system.start(kit.Echo, "other")
    echo = system.start(kit.Echo, "echo", on_end=ends.append)
    told = kit.reply(kit.ask(system, "echo", kit.Crash(kind=kind)), Fault)
    assert told.reason is FaultReason.FAILED
    assert f"{kind} in echo" in told.detail
    assert echo.join(kit.PATIENCE)
    assert [end.kind for end in ends] == [ExitKind.FAULT]
    assert kind in ends[0].detail
    assert kit.fault(kit.ask(system, "echo", kit.Say())) is FaultReason.NO_SUCH_ACTOR
    kit.reply(kit.ask(system, "other", kit.Say()), kit.Answer)


def test_control_messages_overtake_what_waits(system: System) -> None:
    log = kit.Log()
    gate = kit.blocked_gate(system, log)
    for number in range(3):
        system.node.tell("here/gate", kit.Say(number=number))
    system.node.tell("here/gate", kit.Urgent(number=7))
    gate.let_go.set()
    log.wait_count(4)
    assert log.lines == ["Urgent 7", "Say 0", "Say 1", "Say 2"]


def test_a_full_mailbox_is_a_fault_at_once(system: System) -> None:
    log = kit.Log()
    gate = kit.blocked_gate(system, log)
    for _ in range(kit.Gate.mailbox_limit):
        assert system.node.tell("here/gate", kit.Say()) is None
    assert kit.fault(kit.ask(system, "gate", kit.Say())) is FaultReason.MAILBOX_FULL
    gate.let_go.set()


def test_what_expired_in_the_mailbox_is_not_executed(system: System) -> None:
    log = kit.Log()
    gate = kit.blocked_gate(system, log)
    outcomes: list[Message] = []
    gate.deliver(kit.delivery(kit.Say(number=1), outcomes, age=0.001))
    gate.deliver(kit.delivery(kit.Say(number=2), outcomes))
    gate.let_go.set()
    log.wait_for("Say 2")
    assert log.lines == ["Say 2"]
    assert isinstance(outcomes[0], Fault)
    assert outcomes[0].reason is FaultReason.EXPIRED


# ---- asks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message", "expected"),
    [
        ("echo", kit.Say(word="hi"), "hi"),
        ("echo", kit.Unknown(), FaultReason.UNHANDLED),
        ("nobody", kit.Say(), FaultReason.NO_SUCH_ACTOR),
        ("silent", kit.Say(), FaultReason.EXPIRED),
    ],
)
def test_an_ask_of_an_actor_ends_in_its_own_thread(
    system: System, path: str, message: Message, expected: object
) -> None:
    class Silent(Actor):
        mailbox_limit = 4

        @handles(kit.Say)
        def on_say(self, message: kit.Say, delivery: Delivery) -> object:
            return LATER

    system.start(kit.Echo, "echo")
    system.start(Silent, "silent")
    asker = system.start(kit.Echo, "asker")
    outcomes: list[tuple[Message, str]] = []
    done = threading.Event()

    def then(outcome: Message) -> None:
        outcomes.append((outcome, threading.current_thread().name))
        done.set()

    timeout = 0.05 if path == "silent" else kit.PATIENCE
    asker.post(lambda: asker.ask(f"here/{path}", message, then, timeout=timeout))
    assert done.wait(kit.PATIENCE)
    ((outcome, thread),) = outcomes
    assert thread == "asker"
    got = outcome.reason if isinstance(outcome, Fault) else getattr(outcome, "word", None)
    assert got == expected


# ---- the end -------------------------------------------------------------------------------------


def test_what_was_left_in_the_mailbox_comes_back_as_closed(system: System) -> None:
    log = kit.Log()
    gate = kit.blocked_gate(system, log)
    asks = [kit.ask(system, "gate", kit.Say(number=n)) for n in range(5)]
    gate.request_stop(1.0)
    gate.let_go.set()
    assert {kit.fault(one) for one in asks} == {FaultReason.MAILBOX_CLOSED}
    log.wait_for("stopped")
    assert log.lines == ["stopped"]


def test_on_stop_runs_and_the_end_is_told_however_it_ends(system: System) -> None:
    class Fragile(kit.Echo):
        def __init__(self, place: Place, log: kit.Log, *, fails: str) -> None:
            super().__init__(place)
            self.log, self.fails = log, fails

        def on_start(self) -> None:
            if self.fails == "start":
                raise SystemExit("no start")

        def on_stop(self) -> None:
            self.log.add("stopped")
            raise ValueError("no end")

    for fails, first in (("start", "SystemExit"), ("handler", "RuntimeError"), ("", "ValueError")):
        log, ends, ready = kit.Log(), list[ExitReason](), list[str]()
        path = f"fragile{fails}"
        actor = system.start(
            Fragile,
            path,
            log,
            fails=fails,
            on_ready=lambda ready=ready: ready.append("up"),  # type: ignore[misc]
            on_end=ends.append,
        )
        if fails == "handler":
            assert kit.fault(kit.ask(system, path, kit.Crash())) is FaultReason.FAILED
        elif not fails:
            actor.request_stop(1.0)
        assert actor.join(kit.PATIENCE)
        assert log.lines == ["stopped"]
        assert ready == ([] if fails == "start" else ["up"])
        # What came first is the reason, not what it led to.
        assert [(end.kind, end.detail.split(":")[0]) for end in ends] == [(ExitKind.FAULT, first)]
        assert system.find(path) is None


def test_inspection_of_an_actor_waits_for_it(system: System) -> None:
    log = kit.Log()
    gate = kit.blocked_gate(system, log)
    question = kit.ask(system, "gate", Inspect())
    early = kit.ask(system, "gate", Inspect(), timeout=0.05)
    assert kit.fault(early) is FaultReason.EXPIRED
    gate.let_go.set()
    status = kit.reply(question, ActorStatus)
    assert (status.path, status.kind, status.state) == ("gate", "Gate", "running")
    assert (status.generation, status.limit, status.restarts) == (1, 32, 0)


def test_tells_nobody_would_hear_of_are_counted(system: System) -> None:
    log = kit.Log()
    gate = kit.blocked_gate(system, log)
    system.node.tell("here/gate", kit.Say(number=1), timeout=0.0)
    gate.request_stop(1.0)
    gate.let_go.set()
    assert gate.join(kit.PATIENCE)
    assert system.node.counters["fault_mailbox_closed"] == 1

    second = kit.blocked_gate(system, log)
    system.node.tell("here/gate", kit.Say(number=2), timeout=0.0)
    question = kit.ask(system, "gate", kit.Say(number=3))
    second.let_go.set()
    kit.reply(question, Done)
    assert system.node.counters["fault_expired"] == 1
    assert log.lines == ["stopped", "Say 3"]
