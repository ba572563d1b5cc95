"""OTP's cases, one by one, with plain numbers for a clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from voidbus.actors.runtime.policy import (
    Action,
    AddChild,
    ChildExited,
    ChildPolicy,
    ChildStarted,
    ChildStopped,
    DuplicateChildError,
    Escalate,
    Event,
    ExitKind,
    ExitReason,
    Finished,
    RemoveChild,
    Restart,
    ScheduleTick,
    StartChild,
    StopAll,
    StopChild,
    Strategy,
    SupervisorPhase,
    SupervisorPolicy,
    SupervisorStoppingError,
    Tick,
    UnknownChildError,
    backoff,
    decide,
    initial_state,
)

FAULT = ExitReason(ExitKind.FAULT, "boom")
NORMAL = ExitReason(ExitKind.NORMAL)
SHUTDOWN = ExitReason(ExitKind.SHUTDOWN)
POLICY = SupervisorPolicy(
    strategy=Strategy.ONE_FOR_ONE,
    max_restarts=3,
    window=10,
    backoff_initial=1,
    backoff_max=8,
    backoff_factor=2,
    jitter=0,
    stable_after=60,
)


def child(
    name: str, restart: Restart = Restart.PERMANENT, *, significant: bool = False
) -> ChildPolicy:
    return ChildPolicy(name, restart, stop_timeout=5, significant=significant)


class Play:
    """A supervisor and its clock."""

    def __init__(self, policy: SupervisorPolicy, *children: ChildPolicy) -> None:
        self.state = initial_state(policy, children)
        self.now = 0.0

    def happens(self, *events: Event, at: float | None = None) -> list[Action]:
        self.now = self.now if at is None else at
        actions: list[Action] = []
        for event in events:
            self.state, more = decide(self.state, event, self.now, 0.5)
            actions += more
        return actions

    def up(self) -> Play:
        """Start everything; generations are 1, 2, 3..."""
        queue = self.happens(Tick())
        for action in queue:
            assert isinstance(action, StartChild)
            queue += self.happens(ChildStarted(action.name, action.generation))
        return self

    def names(self) -> list[str]:
        return [one.name for one in self.state.children]


def test_children_start_in_order_each_after_the_one_before_is_up() -> None:
    play = Play(POLICY, child("a"), child("b"))
    assert play.happens(Tick()) == [StartChild("a", 1)]
    assert play.happens(Tick()) == []
    assert play.happens(ChildStarted("a", 1)) == [StartChild("b", 2)]


@pytest.mark.parametrize(
    ("restart", "reason", "restarted"),
    [
        (Restart.PERMANENT, NORMAL, True),
        (Restart.PERMANENT, SHUTDOWN, True),
        (Restart.PERMANENT, FAULT, True),
        (Restart.TRANSIENT, NORMAL, False),
        (Restart.TRANSIENT, SHUTDOWN, False),
        (Restart.TRANSIENT, FAULT, True),
        (Restart.TEMPORARY, NORMAL, False),
        (Restart.TEMPORARY, FAULT, False),
    ],
)
def test_who_is_restarted_after_what(restart: Restart, reason: ExitReason, restarted: bool) -> None:
    play = Play(POLICY, child("a", restart)).up()
    assert play.happens(ChildExited("a", 1, reason)) == ([StartChild("a", 2)] if restarted else [])
    assert play.names() == ([] if restart is Restart.TEMPORARY else ["a"])


def test_one_for_one_restarts_only_the_one() -> None:
    play = Play(POLICY, child("a"), child("b"), child("c")).up()
    assert play.happens(ChildExited("b", 2, FAULT)) == [StartChild("b", 4)]


def test_one_for_all_stops_the_others_in_reverse_and_starts_all_in_order() -> None:
    play = Play(replace(POLICY, strategy=Strategy.ONE_FOR_ALL), child("a"), child("b"), child("c"))
    play.up()
    assert play.happens(ChildExited("b", 2, FAULT)) == [StopChild("c", 3, 5)]
    assert play.happens(ChildStopped("c", 3)) == [StopChild("a", 1, 5)]
    assert play.happens(ChildStopped("a", 1)) == [StartChild("a", 4)]
    assert play.happens(ChildStarted("a", 4)) == [StartChild("b", 5)]
    assert play.happens(ChildStarted("b", 5)) == [StartChild("c", 6)]


def test_rest_for_one_leaves_the_earlier_ones_alone() -> None:
    play = Play(replace(POLICY, strategy=Strategy.REST_FOR_ONE), child("a"), child("b"), child("c"))
    play.up()
    assert play.happens(ChildExited("b", 2, FAULT)) == [StopChild("c", 3, 5)]
    assert play.happens(ChildStopped("c", 3)) == [StartChild("b", 4)]
    assert play.happens(ChildStarted("b", 4)) == [StartChild("c", 5)]


def test_a_member_that_crashes_while_its_group_stops_is_not_counted_again() -> None:
    play = Play(replace(POLICY, strategy=Strategy.ONE_FOR_ALL), child("a"), child("b"), child("c"))
    play.up()
    play.happens(ChildExited("b", 2, FAULT))
    assert play.happens(ChildExited("a", 1, FAULT)) == []
    assert play.happens(ChildExited("c", 3, FAULT)) == [StartChild("a", 4)]
    assert len(play.state.restarts) == 1


def test_a_temporary_child_stopped_with_its_group_stays_away() -> None:
    temporary = child("t", Restart.TEMPORARY)
    play = Play(replace(POLICY, strategy=Strategy.ONE_FOR_ALL), child("a"), temporary).up()
    assert play.happens(ChildExited("a", 1, FAULT)) == [StopChild("t", 2, 5)]
    assert play.happens(ChildStopped("t", 2)) == [StartChild("a", 3)]
    assert play.names() == ["a"]


def test_an_exit_of_an_old_generation_is_ignored() -> None:
    play = Play(POLICY, child("a")).up()
    play.happens(ChildExited("a", 1, FAULT), ChildStarted("a", 2))
    before = play.state
    assert (
        play.happens(ChildExited("a", 1, FAULT), ChildStopped("a", 1), ChildStarted("a", 1)) == []
    )
    assert play.state == before


def test_a_new_child_of_an_old_name_gets_a_generation_of_its_own() -> None:
    play = Play(POLICY, child("a", Restart.TEMPORARY)).up()
    play.happens(ChildExited("a", 1, NORMAL))
    assert play.happens(AddChild(child("a"))) == [StartChild("a", 2)]


def test_too_many_restarts_stop_everything_in_reverse_and_escalate() -> None:
    play = Play(replace(POLICY, max_restarts=1), child("a"), child("b"), child("c")).up()
    assert play.happens(ChildExited("b", 2, FAULT)) == [StartChild("b", 4)]
    play.happens(ChildStarted("b", 4))
    assert play.happens(ChildExited("b", 4, FAULT)) == [StopChild("c", 3, 5)]
    assert play.happens(ChildStopped("c", 3)) == [StopChild("a", 1, 5)]
    [last] = play.happens(ChildExited("a", 1, FAULT))
    assert isinstance(last, Escalate)
    assert "'b'" in last.reason
    assert "boom" in last.reason
    assert play.state.phase is SupervisorPhase.FINISHED
    assert play.happens(Tick(), StopAll(0), ChildExited("a", 1, FAULT)) == []


def test_restarts_older_than_the_window_are_forgotten() -> None:
    play = Play(replace(POLICY, max_restarts=1, stable_after=0), child("a")).up()
    for generation, at in ((1, 0.0), (2, 10.5), (3, 21.0)):
        assert play.happens(ChildExited("a", generation, FAULT), at=at) == [
            StartChild("a", generation + 1)
        ]
        play.happens(ChildStarted("a", generation + 1))


def test_the_first_restart_is_immediate_and_later_ones_wait_longer() -> None:
    play = Play(replace(POLICY, max_restarts=99), child("a")).up()
    assert play.happens(ChildExited("a", 1, FAULT)) == [StartChild("a", 2)]
    assert play.happens(ChildExited("a", 2, FAULT)) == [ScheduleTick(1)]
    assert play.happens(Tick(), at=0.9) == [ScheduleTick(1)]  # a timer that rang early rings again
    assert play.happens(Tick(), at=1) == [StartChild("a", 3)]
    assert play.happens(ChildExited("a", 3, FAULT)) == [ScheduleTick(3)]


def test_a_stable_life_ends_the_streak() -> None:
    play = Play(POLICY, child("a")).up()
    play.happens(ChildExited("a", 1, FAULT), ChildStarted("a", 2))
    assert play.happens(ChildExited("a", 2, FAULT), at=60) == [StartChild("a", 3)]


def test_one_for_one_restarts_do_not_wait_for_a_sibling_in_backoff() -> None:
    play = Play(POLICY, child("a"), child("b")).up()
    play.happens(ChildExited("a", 1, FAULT), ChildExited("a", 3, FAULT))
    assert play.happens(ChildExited("b", 2, FAULT)) == [StartChild("b", 4)]
    assert play.happens(AddChild(child("c"))) == [StartChild("c", 5)]


@pytest.mark.parametrize(("random", "expected"), [(0.0, 0.5), (0.5, 1.0), (0.75, 1.25)])
def test_jitter_spreads_the_wait(random: float, expected: float) -> None:
    assert backoff(replace(POLICY, jitter=0.5), 2, random) == expected


def test_the_wait_is_capped_however_long_the_streak() -> None:
    policy = replace(POLICY, jitter=1)
    assert [backoff(POLICY, streak, 0.5) for streak in range(1, 8)] == [0, 1, 2, 4, 8, 8, 8]
    assert backoff(policy, 10**9, 0.999) == 8


def test_stopping_hands_on_what_is_left_of_one_deadline() -> None:
    play = Play(POLICY, child("a"), child("b"), child("c")).up()
    assert play.happens(StopAll(8), at=1) == [StopChild("c", 3, 5), ScheduleTick(8)]
    assert play.happens(ChildStopped("c", 3), at=6) == [StopChild("b", 2, 2)]
    assert play.happens(Tick(), at=8) == [StopChild("a", 1, 0)]
    assert play.happens(ChildStopped("a", 1)) == []
    assert play.happens(ChildExited("b", 2, FAULT)) == [Finished("stopped as asked")]


def test_a_shorter_deadline_shortens_a_stop_under_way() -> None:
    play = Play(POLICY, child("a")).up()
    assert play.happens(RemoveChild("a")) == [StopChild("a", 1, 5)]
    assert play.happens(StopAll(3), at=1) == [StopChild("a", 1, 2)]
    assert play.happens(StopAll(9)) == []


def test_a_supervisor_without_children_finishes_at_once() -> None:
    assert Play(POLICY).happens(StopAll(1)) == [Finished("stopped as asked")]


def test_a_child_in_backoff_is_not_started_by_a_stopping_supervisor() -> None:
    play = Play(POLICY, child("a")).up()
    play.happens(ChildExited("a", 1, FAULT), ChildExited("a", 2, FAULT))
    assert play.happens(StopAll(9)) == [Finished("stopped as asked")]


def test_removed_children_stop_at_once_and_are_forgotten() -> None:
    play = Play(POLICY, child("a"), child("b")).up()
    assert play.happens(RemoveChild("a"), RemoveChild("b")) == [
        StopChild("a", 1, 5),
        StopChild("b", 2, 5),
    ]
    with pytest.raises(DuplicateChildError, match="still stopping"):
        play.happens(AddChild(child("a")))
    assert play.happens(ChildExited("a", 1, FAULT)) == []
    assert play.names() == ["b"]


def test_an_adopted_child_runs_already_and_its_generation_counts() -> None:
    play = Play(POLICY)
    assert play.happens(AddChild(child("a"), adopted=41)) == []
    assert play.happens(ChildExited("a", 40, FAULT)) == []
    assert play.happens(ChildExited("a", 41, FAULT)) == [StartChild("a", 42)]


def test_the_end_of_a_significant_child_ends_the_supervisor() -> None:
    play = Play(POLICY, child("a"), child("main", Restart.TRANSIENT, significant=True)).up()
    assert play.happens(ChildExited("main", 2, NORMAL)) == [StopChild("a", 1, 5)]
    [last] = play.happens(ChildStopped("a", 1))
    assert isinstance(last, Finished)
    assert "'main'" in last.detail


def test_what_cannot_be_done_is_refused() -> None:
    play = Play(POLICY, child("a"))
    with pytest.raises(DuplicateChildError):
        play.happens(AddChild(child("a")))
    with pytest.raises(DuplicateChildError):
        initial_state(POLICY, [child("a"), child("a")])
    with pytest.raises(UnknownChildError):
        play.happens(RemoveChild("b"))
    play.happens(StopAll(1))
    with pytest.raises(SupervisorStoppingError):
        play.happens(AddChild(child("b")))
    with pytest.raises(ValueError, match="significant"):
        child("x", significant=True)
    with pytest.raises(ValueError, match="jitter"):
        replace(POLICY, jitter=2)
