"""Timers and jobs: what an actor does beside its messages."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import actor_kit as kit
import pytest

from voidbus.actors.runtime.actor import Refuse
from voidbus.actors.runtime.policy import ExitKind, ExitReason
from voidbus.actors.runtime.system import System
from voidbus.transport.fault import FaultReason


@pytest.fixture
def system() -> Iterator[System]:
    with kit.local_system() as made:
        yield made


# ---- timers --------------------------------------------------------------------------------------


def test_timers_run_in_the_order_of_their_times_by_the_clock_of_the_system() -> None:
    clock, log = kit.FakeClock(), kit.Log()
    with kit.local_system(clock) as system:
        echo = system.start(kit.Echo, "echo")

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
    echo, fired = system.start(kit.Echo, "echo"), threading.Event()
    kit.post(echo, lambda: echo.after(0.01, fired.set))
    assert fired.wait(kit.PATIENCE)


def test_a_timer_that_sets_itself_again_at_once_does_not_starve_the_messages(
    system: System,
) -> None:
    echo = system.start(kit.Echo, "echo")

    def again() -> None:
        echo.after(0.0, again)

    echo.post(again)
    for _ in range(10):
        kit.reply(kit.ask(system, "echo", kit.Say()), kit.Answer)


def test_no_message_is_handled_after_a_timer_ended_the_actor() -> None:
    clock, log = kit.FakeClock(), kit.Log()
    with kit.local_system(clock) as system:
        gate = kit.blocked_gate(system, log)
        over = ExitReason(ExitKind.NORMAL, "over")
        kit.post(
            gate,
            lambda: gate.after(1.0, lambda: gate.end(over)),
            lambda: clock.advance(1.0),
        )
        question = kit.ask(system, "gate", kit.Say(number=1))
        gate.let_go.set()
        assert kit.fault(question) is FaultReason.MAILBOX_CLOSED
        assert gate.join(kit.PATIENCE)
        assert log.lines == ["stopped"]


# ---- jobs ----------------------------------------------------------------------------------------


def test_a_job_runs_beside_the_actor_and_its_result_comes_to_its_thread(system: System) -> None:
    echo = system.start(kit.Echo, "echo")
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
    echo = system.start(kit.Echo, "echo")
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
    echo = system.start(kit.Echo, "echo")
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
    echo, log = system.start(kit.Echo, "echo"), kit.Log()

    def next_one(left: int) -> None:
        if left:
            echo.work(lambda: None, lambda _: next_one(left - 1))
        else:
            log.add("chain over")

    kit.post(echo, *[lambda: next_one(50)] * 16)
    log.wait_for(*["chain over"] * 16)


def test_the_end_of_an_actor_waits_for_its_jobs(system: System) -> None:
    echo, log = system.start(kit.Echo, "echo", on_end=lambda _: log.add("ended")), kit.Log()
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
