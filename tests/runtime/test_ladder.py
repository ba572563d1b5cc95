from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidbus.actors.runtime.ladder import (
    MINIMUM_KILL_SHARE,
    Done,
    Step,
    StopLadder,
    StopOutcome,
)

ORDER = list(Step)


def test_each_step_gets_its_share_of_the_total() -> None:
    ladder = StopLadder(10, drain=0.5, tell=0.2, terminate=0.2)
    assert ladder.begin(100) is Step.DRAIN
    times = (104.9, 105.0, 107.0, 109.0)
    seen = [(ladder.advance(now, gone=False), ladder.next_at) for now in times]
    assert seen == [
        (Step.DRAIN, pytest.approx(105)),
        (Step.TELL, pytest.approx(107)),
        (Step.TERMINATE, pytest.approx(109)),
        (Step.KILL, 110),
    ]


@pytest.mark.parametrize(
    ("at", "outcome"),
    [
        (1, StopOutcome.DRAINED),
        (6, StopOutcome.TOLD),
        (8, StopOutcome.TERMINATED),
        (9.5, StopOutcome.KILLED),
    ],
)
def test_the_step_that_worked_is_recorded(at: float, outcome: StopOutcome) -> None:
    ladder = StopLadder(10)
    ladder.begin(0)
    ladder.advance(at, gone=False)
    done = ladder.advance(at, gone=True)
    assert isinstance(done, Done)
    assert (done.outcome, done.elapsed) == (outcome, at)
    assert ladder.next_at is None
    assert ladder.advance(99, gone=False) == done


def test_a_process_that_survives_the_kill_is_reported_as_a_survivor() -> None:
    ladder = StopLadder(10)
    ladder.begin(0)
    assert ladder.advance(9.99, gone=False) is Step.KILL
    assert ladder.advance(10, gone=False) == Done(Step.KILL, StopOutcome.SURVIVED, 10)


def test_a_late_call_never_passes_over_the_kill() -> None:
    ladder = StopLadder(10, drain=0.9, tell=0, terminate=0)
    ladder.begin(0)
    assert ladder.advance(50, gone=False) is Step.KILL
    assert ladder.advance(50, gone=False) == Done(Step.KILL, StopOutcome.SURVIVED, 50)


def test_steps_without_a_share_are_left_out() -> None:
    ladder = StopLadder(10, drain=0, tell=0, terminate=0.5)
    assert ladder.begin(0) is Step.TERMINATE
    assert ladder.advance(5, gone=False) is Step.KILL


def test_without_any_time_the_first_step_is_the_kill() -> None:
    assert StopLadder(0).begin(7) is Step.KILL


def test_shortening_splits_what_is_left_among_the_steps_to_come() -> None:
    ladder = StopLadder(100, drain=0.5, tell=0, terminate=0.25)
    ladder.begin(0)
    ladder.shorten(10, 8)
    assert ladder.next_at == pytest.approx(14)
    ladder.shorten(10, 1000)
    assert ladder.next_at == pytest.approx(14)
    assert ladder.advance(14.1, gone=False) is Step.TERMINATE
    ladder.shorten(15, 0)
    assert ladder.advance(15, gone=False) is Step.KILL


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.0), (-0.1, 0.1, 0.1), (0.99, 0, 0)])
def test_shares_that_leave_nothing_to_the_kill_are_refused(
    shares: tuple[float, float, float],
) -> None:
    drain, tell, terminate = shares
    with pytest.raises(ValueError, match="to the kill"):
        StopLadder(10, drain=drain, tell=tell, terminate=terminate)


def test_a_ladder_serves_one_stop_and_only_once_begun() -> None:
    ladder = StopLadder(1)
    with pytest.raises(RuntimeError):
        ladder.advance(0, gone=False)
    ladder.begin(0)
    with pytest.raises(RuntimeError):
        ladder.begin(0)


@given(
    total=st.floats(0, 1000),
    weights=st.lists(st.integers(0, 10), min_size=3, max_size=3),
    steps=st.lists(st.tuples(st.floats(0, 50), st.booleans()), max_size=30),
)
def test_a_ladder_only_climbs_ends_in_time_and_keeps_a_reserve_for_the_kill(
    total: float, weights: list[int], steps: list[tuple[float, bool]]
) -> None:
    drain, tell, terminate = (weight / 32 for weight in weights)
    ladder = StopLadder(total, drain=drain, tell=tell, terminate=terminate)
    now, end = 0.0, total
    last: Step = ladder.begin(now)
    for delta, shorten in steps:
        now += delta
        if shorten:
            ladder.shorten(now, delta / 2)
            end = min(end, now + delta / 2)
        result = ladder.advance(now, gone=False)
        if isinstance(result, Done):
            assert result.step_used is Step.KILL
            assert now >= end
            return
        assert ORDER.index(result) >= ORDER.index(last)
        last = result
        if now >= end - total * MINIMUM_KILL_SHARE and not any(s for _, s in steps):
            assert result is Step.KILL
        assert ladder.next_at is not None
        assert ladder.next_at <= end
    done = ladder.advance(now, gone=True)
    assert isinstance(done, Done)
    assert done.step_used is last
