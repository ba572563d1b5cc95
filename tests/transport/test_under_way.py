"""What is under way ends once: taken by whoever comes first, or at its deadline."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transport_kit import Bus, Echo, Look, Mute, Signal

from voidbus.transport.fault import Fault, FaultReason
from voidbus.transport.under_way import LOOK_SECONDS, UnderWay


@dataclass(frozen=True)
class Thing:
    deadline: float


moments = st.floats(0, 100)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), moments),
            st.tuples(st.just("take"), st.integers(0, 20)),
            st.tuples(st.just("sleep"), st.just(None)),
        ),
        max_size=60,
    )
)
def test_a_sleeper_who_heeds_what_it_is_told_ends_everything_at_its_deadline(
    steps: list[tuple[str, float | None]],
) -> None:
    things: UnderWay[int, Thing] = UnderWay()
    held: dict[int, float] = {}
    now, wake_at, number = 0.0, None, 0
    for step, value in steps:
        if step == "add":
            assert value is not None
            number += 1
            held[number] = now + value
            if things.add(number, Thing(now + value)):
                wake_at = things.next_at()
        elif step == "take":
            assert value is not None
            taken = things.take(int(value))
            assert (taken and taken.deadline) == held.pop(int(value), None)
        elif wake_at is not None:
            now = wake_at
            due = [key for key, _ in things.take_due(now)]
            assert set(due) == {key for key, deadline in held.items() if deadline <= now}
            for key in due:
                assert held.pop(key) >= now - LOOK_SECONDS - 1e-9  # of rounding
            wake_at = things.next_at()
        assert wake_at is not None or not held
        assert len(things) == len(held)
    assert (things.next_at() is None) == (not held)


def test_one_of_the_threads_that_want_it_gets_it() -> None:
    things: UnderWay[int, Thing] = UnderWay()
    got: list[int] = []

    def want() -> None:
        got.extend(key for key in range(2_000) if things.take(key) is not None)

    for key in range(2_000):
        things.add(key, Thing(1.0))
    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    due = [key for key, _ in things.take_due(2.0)]
    for thread in threads:
        thread.join(20.0)
    assert sorted(got + due) == list(range(2_000))


def test_deadlines_that_lie_close_are_looked_at_together() -> None:
    things: UnderWay[int, Thing] = UnderWay()
    for key in range(10):
        things.add(key, Thing(1.0 + key / 1000))
    assert things.next_at() == 1.0
    assert len(things.take_due(1.0)) == 1
    assert things.next_at() == 1.0 + LOOK_SECONDS
    assert things.take_due(1.01) == []
    assert len(things.take_due(1.0 + LOOK_SECONDS)) == 9
    assert things.next_at() is None


def test_an_ask_that_could_not_leave_does_not_keep_a_later_one_from_its_deadline(
    tmp_path: Path,
) -> None:
    bus = Bus("ipc", tmp_path)
    try:
        bus.hub.attach("x", Mute())
        bus.hub.attach("y", Echo())
        held, go, ended = threading.Event(), threading.Event(), Signal()
        leaf = bus.leaf("client-a", queue_limit=1)
        leaf.ask("hub/y", Look(), timeout=60.0).result()  # its timers are set by now

        def hold() -> None:
            held.set()
            go.wait(20.0)

        leaf._loop.call(hold)
        assert held.wait(20.0)
        leaf.tell("hub/x", Look())
        refused = leaf.ask("hub/x", Look(), timeout=0.01).wait()
        assert isinstance(refused, Fault)
        assert refused.reason is FaultReason.OVERLOADED
        go.set()
        sent = Signal()
        leaf._loop.call(lambda: sent(True))
        sent.wait(bool)
        leaf.ask("hub/x", Look(), timeout=0.2, on_end=ended)
        (ask,) = ended.wait(bool)
        assert isinstance(ask.outcome, Fault)
        assert ask.outcome.reason is FaultReason.EXPIRED
    finally:
        bus.close()
