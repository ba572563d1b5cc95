"""Actors: handlers, faults, ends, timers, jobs, asks, commands and the order of it all."""

from __future__ import annotations

import builtins
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

import actor_kit as kit
import pytest

from voidbus.actors.messages.actor import ActorStatus, Done, Inspect, Terminated
from voidbus.actors.runtime.actor import LATER, Actor, Place, Refuse, handles
from voidbus.actors.runtime.mailbox import Overflow
from voidbus.actors.runtime.policy import ExitKind, ExitReason
from voidbus.actors.runtime.system import System
from voidbus.transport.delivery import Delivery
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


class Echo(Actor):
    """Answers what is said; crashes as told."""

    mailbox_limit = 32

    @handles(kit.Say)
    def on_say(self, message: kit.Say, delivery: Delivery) -> object:
        return kit.Answer(word=message.word)

    @handles(kit.Crash)
    def on_crash(self, message: kit.Crash, delivery: Delivery) -> None:
        raise getattr(builtins, message.kind)("boom")


class Gate(Actor):
    """Blocks in its handler of Crash until it is let go; logs what it handles."""

    mailbox_limit = 32
    control: ClassVar[frozenset[type[Message]]] = frozenset({kit.Urgent})

    def __init__(self, place: Place, log: kit.Log) -> None:
        super().__init__(place)
        self.log = log
        self.blocked = threading.Event()
        self.let_go = threading.Event()

    @handles(kit.Crash)
    def on_block(self, message: kit.Crash, delivery: Delivery) -> None:
        self.blocked.set()
        assert self.let_go.wait(kit.PATIENCE)

    @handles(kit.Say, kit.Urgent, kit.Change)
    def on_other(self, message: kit.Say | kit.Urgent, delivery: Delivery) -> None:
        self.log.add(f"{type(message).__name__} {getattr(message, 'number', '')}".strip())

    def on_stop(self) -> None:
        self.log.add("stopped")


def blocked_gate(system: System, log: kit.Log) -> Gate:
    gate = system.start(Gate, "gate", log)
    system.node.tell("here/gate", kit.Crash())
    assert gate.blocked.wait(kit.PATIENCE)
    return gate


# ---- handlers --------------------------------------------------------------------------------


def test_a_message_is_handled_by_its_type(system: System) -> None:
    system.start(Echo, "echo")
    assert kit.reply(kit.ask(system, "echo", kit.Say(word="hello")), kit.Answer).word == "hello"


def test_a_handler_that_returns_nothing_answers_done(system: System) -> None:
    class Quiet(Actor):
        mailbox_limit = 1

        @handles(kit.Say)
        def on_say(self, message: kit.Say, delivery: Delivery) -> None: ...

    system.start(Quiet, "quiet")
    kit.reply(kit.ask(system, "quiet", kit.Say()), Done)


def test_a_type_nobody_handles_is_a_typed_fault_and_the_actor_lives(system: System) -> None:
    system.start(Echo, "echo")
    told = kit.reply(kit.ask(system, "echo", kit.Unknown()), Fault)
    assert told.reason is FaultReason.UNHANDLED
    assert "kit.unknown" in told.detail
    system.node.tell("here/echo", kit.Unknown())
    kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)
    assert system.node.counters["fault_unhandled"] == 2


def test_a_returned_tell_that_nobody_handles_harms_nothing(system: System) -> None:
    system.start(Echo, "echo")
    back = Fault(reason=FaultReason.NO_SUCH_NODE, detail="gone", address="there/x")
    system.node.tell("here/echo", back)
    kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)


def test_a_subclass_inherits_handlers_and_its_override_is_called(system: System) -> None:
    class Louder(Echo):
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
    class Other(Echo):
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
    class Never(Echo):
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
    system.start(Echo, "other")
    echo = system.start(Echo, "echo", on_end=ends.append)
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
    gate = blocked_gate(system, log)
    for number in range(3):
        system.node.tell("here/gate", kit.Say(number=number))
    system.node.tell("here/gate", kit.Urgent(number=7))
    gate.let_go.set()
    log.wait_count(4)
    assert log.lines == ["Urgent 7", "Say 0", "Say 1", "Say 2"]


def test_a_full_mailbox_is_a_fault_at_once(system: System) -> None:
    log = kit.Log()
    gate = blocked_gate(system, log)
    for _ in range(Gate.mailbox_limit):
        assert system.node.tell("here/gate", kit.Say()) is None
    assert kit.fault(kit.ask(system, "gate", kit.Say())) is FaultReason.MAILBOX_FULL
    gate.let_go.set()


def test_what_expired_in_the_mailbox_is_not_executed(system: System) -> None:
    log = kit.Log()
    gate = blocked_gate(system, log)
    outcomes: list[Message] = []
    gate.deliver(kit.delivery(kit.Say(number=1), outcomes, age=0.001))
    gate.deliver(kit.delivery(kit.Say(number=2), outcomes))
    gate.let_go.set()
    log.wait_for("Say 2")
    assert log.lines == ["Say 2"]
    assert isinstance(outcomes[0], Fault)
    assert outcomes[0].reason is FaultReason.EXPIRED


# ---- commands --------------------------------------------------------------------------------


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


# ---- timers ----------------------------------------------------------------------------------


def test_timers_run_in_the_order_of_their_times_by_the_clock_of_the_system() -> None:
    clock, log = kit.FakeClock(), kit.Log()
    with kit.local_system(clock) as system:
        echo = system.start(Echo, "echo")

        def set_timers() -> None:
            for seconds in (5.0, 1.0, 3.0, 1.0):
                echo.after(seconds, lambda seconds=seconds: log.add(f"{seconds}"))  # type: ignore[misc]
            echo.after(2.0, lambda: log.add("cancelled")).cancel()

        echo.post(set_timers)
        kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)
        assert log.lines == []
        for seconds, expected in ((0.9, 0), (0.1, 2), (2.0, 3), (2.0, 4)):
            clock.advance(seconds)
            # The first wakes it, the second is answered after the timers that were due then.
            for _ in range(2):
                kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)
            assert len(log.lines) == expected
        assert log.lines == ["1.0", "1.0", "3.0", "5.0"]


def test_a_timer_runs_without_any_message(system: System) -> None:
    echo, fired = system.start(Echo, "echo"), threading.Event()
    echo.post(lambda: echo.after(0.01, fired.set) and None)
    assert fired.wait(kit.PATIENCE)


def test_a_timer_that_sets_itself_again_at_once_does_not_starve_the_messages(
    system: System,
) -> None:
    echo = system.start(Echo, "echo")

    def again() -> None:
        echo.after(0.0, again)

    echo.post(again)
    for _ in range(10):
        kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)


def test_no_message_is_handled_after_a_timer_ended_the_actor() -> None:
    clock, log = kit.FakeClock(), kit.Log()
    with kit.local_system(clock) as system:
        gate = blocked_gate(system, log)
        gate.post(
            lambda: gate.after(1.0, lambda: gate.end(ExitReason(ExitKind.NORMAL, "over"))) and None
        )
        gate.post(lambda: clock.advance(1.0))
        question = kit.ask(system, "gate", kit.Say(number=1))
        gate.let_go.set()
        assert kit.fault(question) is FaultReason.MAILBOX_CLOSED
        assert gate.join(kit.PATIENCE)
        assert log.lines == ["stopped"]


# ---- jobs ------------------------------------------------------------------------------------


def test_a_job_runs_beside_the_actor_and_its_result_comes_to_its_thread(system: System) -> None:
    echo = system.start(Echo, "echo")
    results: list[object] = []
    gate, done = threading.Event(), threading.Event()

    def then(outcome: object) -> None:
        results.append((outcome, threading.current_thread().name))
        done.set()

    def job() -> int:
        assert gate.wait(kit.PATIENCE)
        return 7

    echo.post(lambda: echo.work(job, then))
    kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)
    gate.set()
    assert done.wait(kit.PATIENCE)
    assert results == [(7, "echo")]


@pytest.mark.parametrize("error", [ValueError("bad"), SystemExit("out"), KeyboardInterrupt()])
def test_what_a_job_raises_comes_to_the_actor(system: System, error: BaseException) -> None:
    echo = system.start(Echo, "echo")
    results: list[object] = []
    done = threading.Event()

    def then(outcome: object) -> None:
        results.append(outcome)
        done.set()

    def job() -> None:
        raise error

    echo.post(lambda: echo.work(job, then))
    assert done.wait(kit.PATIENCE)
    (result,) = results
    assert result is error if isinstance(error, Exception) else isinstance(result, RuntimeError)
    kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)


def test_too_many_jobs_are_refused_and_a_job_that_ended_makes_room(system: System) -> None:
    echo = system.start(Echo, "echo")
    gate, log = threading.Event(), kit.Log()

    def start() -> None:
        for _ in range(16):
            echo.work(lambda: gate.wait(kit.PATIENCE), lambda _: log.add("done"))
        try:
            echo.work(lambda: None, lambda _: None)
        except Refuse as refusal:
            log.add(refusal.reason.value)

    echo.post(start)
    log.wait_for("overloaded")
    gate.set()
    log.wait_count(17)
    echo.post(lambda: echo.work(lambda: None, lambda _: log.add("one more")))
    log.wait_for("one more")


def test_a_result_may_start_the_next_job_when_all_places_were_taken(system: System) -> None:
    """The place is free when the result is handled, not when its thread has wound down."""
    echo, log = system.start(Echo, "echo"), kit.Log()

    def next_one(left: int) -> None:
        if left:
            echo.work(lambda: None, lambda _: next_one(left - 1))
        else:
            log.add("chain over")

    echo.post(lambda: [next_one(50) for _ in range(16)] and None)
    log.wait_for(*["chain over"] * 16)


def test_the_end_of_an_actor_waits_for_its_jobs(system: System) -> None:
    echo, log = system.start(Echo, "echo", on_end=lambda _: log.add("ended")), kit.Log()
    gate, started = threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        assert gate.wait(kit.PATIENCE)
        log.add("job over")

    echo.post(lambda: echo.work(job, lambda _: log.add("never")))
    assert started.wait(kit.PATIENCE)
    echo.request_stop(1.0)
    assert kit.fault(kit.ask(system, "echo", kit.Say())) in (
        FaultReason.MAILBOX_CLOSED,
        FaultReason.NO_SUCH_ACTOR,
    )
    gate.set()
    log.wait_for("ended")
    assert log.lines == ["job over", "ended"]


# ---- asks ------------------------------------------------------------------------------------


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

    system.start(Echo, "echo")
    system.start(Silent, "silent")
    asker = system.start(Echo, "asker")
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


# ---- the end ---------------------------------------------------------------------------------


def test_what_was_left_in_the_mailbox_comes_back_as_closed(system: System) -> None:
    log = kit.Log()
    gate = blocked_gate(system, log)
    asks = [kit.ask(system, "gate", kit.Say(number=n)) for n in range(5)]
    gate.request_stop(1.0)
    gate.let_go.set()
    assert {kit.fault(one) for one in asks} == {FaultReason.MAILBOX_CLOSED}
    log.wait_for("stopped")
    assert log.lines == ["stopped"]


def test_on_stop_runs_and_the_end_is_told_however_it_ends(system: System) -> None:
    class Fragile(Echo):
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
    gate = blocked_gate(system, log)
    question = kit.ask(system, "gate", Inspect())
    early = kit.ask(system, "gate", Inspect(), timeout=0.05)
    assert kit.fault(early) is FaultReason.EXPIRED
    gate.let_go.set()
    status = kit.reply(question, ActorStatus)
    assert (status.path, status.kind, status.state) == ("gate", "Gate", "running")
    assert (status.generation, status.limit, status.restarts) == (1, 32, 0)


# ---- watching --------------------------------------------------------------------------------


class Watcher(Actor):
    """Logs each Terminated it gets. Its mailbox holds one message."""

    mailbox_limit = 1
    overflow = Overflow.REFUSE

    def __init__(self, place: Place, log: kit.Log) -> None:
        super().__init__(place)
        self.log = log

    @handles(Terminated)
    def on_terminated(self, message: Terminated, delivery: Delivery) -> None:
        self.log.add(f"{message.path} {message.generation} {message.reason}")


def watch(system: System, watcher: Watcher, *paths: str) -> None:
    watcher.post(lambda: [watcher.watch(path) for path in paths] and None)
    kit.reply(kit.ask(system, watcher.path, Inspect()), ActorStatus)


def test_a_watcher_hears_of_the_end_after_on_stop_has_run(system: System) -> None:
    log = kit.Log()
    gate = system.start(Gate, "gate", log, generation=5)
    watcher = system.start(Watcher, "watcher", log)
    watch(system, watcher, "gate", "gate")
    gate.request_stop(1.0)
    log.wait_count(2)
    assert log.lines == ["stopped", "gate 5 shutdown"]


def test_a_watcher_hears_of_a_crash_with_its_reason(system: System) -> None:
    log = kit.Log()
    system.start(Echo, "echo")
    watch(system, system.start(Watcher, "watcher", log), "echo")
    kit.ask(system, "echo", kit.Crash())
    log.wait_for("echo 1 fault")


def test_a_watcher_of_nobody_and_of_the_dead_hears_at_once(system: System) -> None:
    log = kit.Log()
    echo = system.start(Echo, "echo")
    echo.request_stop(1.0)
    assert echo.join(kit.PATIENCE)
    watch(system, system.start(Watcher, "watcher", log), "echo", "never")
    log.wait_for("echo 0 no_such_actor", "never 0 no_such_actor")


def test_no_full_mailbox_keeps_a_watcher_from_hearing(system: System) -> None:
    log, gate = kit.Log(), threading.Event()
    watcher = system.start(Watcher, "watcher", log)
    echoes = [system.start(Echo, f"echo{n}") for n in range(5)]
    watch(system, watcher, *(echo.path for echo in echoes))
    watcher.post(lambda: gate.wait(kit.PATIENCE) and None)
    while system.node.tell("here/watcher", kit.Say()) is None:  # fill its one place
        pass
    for echo in echoes:
        echo.request_stop(1.0)
        assert echo.join(kit.PATIENCE)
    gate.set()
    log.wait_for(*(f"echo{n} 1 shutdown" for n in range(5)))


def test_a_watcher_that_was_restarted_hears_nothing_its_forerunner_asked_for(
    system: System,
) -> None:
    log = kit.Log()
    echo = system.start(Echo, "echo")
    first = system.start(Watcher, "watcher", log)
    watch(system, first, "echo")
    first.request_stop(1.0)
    assert first.join(kit.PATIENCE)
    second = system.start(Watcher, "watcher", log)
    echo.request_stop(1.0)
    assert echo.join(kit.PATIENCE)
    watch(system, second, "echo")
    log.wait_for("echo 0 no_such_actor")
    assert log.lines == ["echo 0 no_such_actor"]


def test_an_ask_of_a_stuck_actor_ends_at_its_deadline(system: System) -> None:
    log = kit.Log()
    gate = blocked_gate(system, log)
    before = time.monotonic()
    assert kit.fault(kit.ask(system, "gate", kit.Say(), timeout=0.1)) is FaultReason.EXPIRED
    assert 0.1 <= time.monotonic() - before < kit.PATIENCE / 2
    gate.let_go.set()
