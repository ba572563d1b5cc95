"""What an actor keeps of timers and of open answers: in order, and bounded."""

from __future__ import annotations

import actor_kit as kit
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from voidbus.actors.runtime.replies import CommandReplies, Unanswered
from voidbus.actors.runtime.timers import TimerQueue
from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.message import Message

DELAYS = st.lists(st.tuples(st.integers(-2, 6), st.booleans()), max_size=30)


@settings(max_examples=100, deadline=None)
@given(timers=DELAYS, steps=st.lists(st.integers(0, 3), max_size=12))
def test_timers_run_once_in_order_and_never_early(
    timers: list[tuple[int, bool]], steps: list[int]
) -> None:
    clock = kit.FakeClock()
    start = clock.now
    queue, ran = TimerQueue(clock), list[tuple[float, int]]()
    for number, (delay, cancelled) in enumerate(timers):
        timer = queue.after(delay, lambda at=(delay, number): ran.append(at))  # type: ignore[misc]
        if cancelled:
            timer.cancel()
    for step in steps:
        clock.advance(step)
        wait = queue.run_due(lambda: False)
        passed = clock.now - start
        due = sorted((d, n) for n, (d, gone) in enumerate(timers) if d <= passed and not gone)
        assert ran == due
        ahead = [d - passed for d, gone in timers if d > passed and not gone]
        assert wait == (min(ahead) if ahead else None)


def test_what_a_timer_sets_waits_for_the_next_round() -> None:
    clock = kit.FakeClock()
    queue, ran = TimerQueue(clock), list[int]()

    def again() -> None:
        ran.append(len(ran))
        queue.after(0.0, again)
        queue.after(-5.0, lambda: ran.append(100))

    queue.after(0.0, again)
    assert queue.run_due(lambda: False) == 0.0
    assert ran == [0]
    assert queue.run_due(lambda: False) == 0.0
    assert ran == [0, 100, 2]


def test_no_timer_runs_after_the_one_that_ended_the_actor() -> None:
    queue, ran = TimerQueue(kit.FakeClock()), list[int]()
    for number in range(3):
        queue.after(0.0, lambda number=number: ran.append(number))  # type: ignore[misc]
    queue.run_due(lambda: len(ran) == 2)
    assert ran == [0, 1]


def test_a_timer_that_raises_loses_no_other() -> None:
    clock = kit.FakeClock()
    queue, ran = TimerQueue(clock), list[str]()

    def fails() -> None:
        queue.after(-1.0, lambda: ran.append("set by it"))
        raise ValueError("boom")

    queue.after(0.0, fails)
    queue.after(0.0, lambda: ran.append("after it"))
    with pytest.raises(ValueError, match="boom"):
        queue.run_due(lambda: False)
    assert queue.run_due(lambda: False) is None
    assert ran == ["set by it", "after it"]


def test_timers_that_are_cancelled_cost_no_memory() -> None:
    queue = TimerQueue(kit.FakeClock())
    for _ in range(10_000):
        queue.after(3600.0, lambda: None).cancel()
    assert len(queue) <= 64
    kept = [queue.after(3600.0, lambda: None) for _ in range(1000)]
    assert len(queue) >= len(kept)


def test_open_answers_are_forgotten_when_they_are_given_or_too_late() -> None:
    unanswered, outcomes = Unanswered(), list[Message]()
    given_ = [kit.delivery(kit.Say(), outcomes) for _ in range(10)]
    for one in given_:
        unanswered.add(one)
        one.reply(kit.Answer(word="here"))
    assert (len(unanswered), len(outcomes)) == (0, 10)
    for _ in range(10_000):
        unanswered.add(kit.delivery(kit.Say(), age=1.0))
    assert len(unanswered) <= 64


def test_open_answers_are_faults_at_the_end_and_given_ones_stay_as_they_are() -> None:
    unanswered, outcomes = Unanswered(), list[Message]()
    early = kit.delivery(kit.Say(), outcomes)
    early.reply(kit.Answer(word="early"))
    unanswered.add(early)  # answered before its handler returned LATER
    unanswered.add(kit.delivery(kit.Say(), outcomes))
    unanswered.fail("the end")
    unanswered.fail("the end again")
    assert isinstance(outcomes[0], kit.Answer)
    (told,) = outcomes[1:]
    assert isinstance(told, Fault)
    assert (told.reason, told.detail) == (FaultReason.FAILED, "the end")


def test_a_stored_reply_is_forgotten_by_age_and_a_fault_at_once() -> None:
    replies, outcomes = CommandReplies(limit=10, ttl=60.0), list[Message]()

    def repeat(now: float) -> bool:
        return replies.begin("k", kit.delivery(kit.Change(), outcomes), now)

    assert repeat(0.0)
    replies.finish("k", Fault(reason=FaultReason.REFUSED, detail="no", address="x"), ())
    assert repeat(1.0), "a refused command is carried out when it is tried again"
    assert not repeat(2.0)
    replies.finish("k", kit.Answer(word="done"), ())
    assert not repeat(3.0)
    assert [outcome.tag for outcome in outcomes] == ["kit.answer", "kit.answer"]
    assert repeat(61.5)
